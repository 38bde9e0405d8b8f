"""The sections of a recipe that belong to one task alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorakit.train.sections import Section

Pooling = Literal["mean", "first", "last"]


class EmbeddingSection(Section):
    """``task: embedding``: how a text becomes a vector, and what the vectors learn."""

    pooling: Pooling = Field(
        default="mean",
        description="A text's vector: the `mean` over its tokens, its `first` token (BERT's `[CLS]`), or its `last` "
        "(decoders).",
    )
    loss: Literal["auto", "in_batch_negatives", "cosine"] = Field(
        default="auto",
        description="`in_batch_negatives`: find the partner among all second texts of the batch. `cosine`: the squared "
        "error of the cosine against the pair's score. `auto`: `cosine` where the data have scores.",
    )
    scale: float = Field(
        default=20.0,
        gt=0,
        description="`in_batch_negatives`: what cosines are multiplied by before the softmax: 1 / temperature.",
    )
    symmetric: bool = Field(
        default=False,
        description="`in_batch_negatives`: also find the first text from the second, and take the mean of both.",
    )


class PreferenceSection(Section):
    """``task: dpo``: how strongly the preferred answer is to win."""

    beta: float = Field(
        default=0.1, gt=0, description="How much going away from the base costs; smaller goes further."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="The share of pairs that are taken to be the wrong way round (conservative DPO).",
    )
