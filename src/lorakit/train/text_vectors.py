"""Texts as vectors of length one, and what such vectors learn from pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import DataError
from lorakit.train.collate import text_batch
from lorakit.train.cutting import PlainText, cut_texts
from lorakit.train.recipe import TrainSection
from lorakit.train.row_set import TokenRow
from lorakit.train.scoring import outputs
from lorakit.train.task_sections import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextRow(TokenRow):
    """A text as the model sees it, of which nothing is learnt."""

    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextCollator:
    """Texts side by side, padded on the right."""

    pad: int
    padded: ClassVar[bool] = True

    def __call__(self, rows: Sequence[TextRow]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(rows, longest)``."""
        return text_batch([row.ids for row in rows], self.pad)


def vectors(model: nn.Module, batch: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    """Vectors of length one ``(texts, d)`` in float32.

    Args:
        model: An encoder or decoder without a head.
        batch: ``input_ids`` and ``attention_mask``, padded on the right.
        pooling: How the tokens' states become one vector.
    """
    mask = batch["attention_mask"]
    states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
    if pooling == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    elif pooling == "first":
        pooled = states[:, 0]
    else:
        pooled = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return F.normalize(pooled, dim=1)


def in_batch_negatives(
    first: Tensor, partner: Tensor, negative: Tensor, scale: float, symmetric: bool = False
) -> Tensor:
    """``-log p`` of each partner among all partners of the batch ``(n,)``.

    Args:
        first: Vectors of length one ``(n, d)``.
        partner: Their partners' ``(n, d)``.
        negative: ``(n, n)``: whether the partner of a column is wrong for the text of a row.
        scale: What cosines are multiplied by.
        symmetric: Whether the first text is also to be found from its partner; then the mean of both.
    """
    right = torch.arange(len(first), device=first.device)
    counted = negative | torch.eye(len(first), dtype=torch.bool, device=first.device)
    cosines = (scale * first @ partner.T).masked_fill(~counted, -torch.inf)
    losses = F.cross_entropy(cosines, right, reduction="none")
    return (losses + F.cross_entropy(cosines.T, right, reduction="none")) / 2 if symmetric else losses


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    max_length: int = 1024,
    batch_rows: int = 16,
    told: Any = None,
) -> Tensor:
    """Vectors of length one ``(texts, d)`` in float32 on the CPU, with whatever adapters act.

    Args:
        model: Without a head, as `lorakit.models.load_model` gives for ``task="feature-extraction"``.
        tokenizer: Its tokenizer.
        texts: What to read.
        pooling: How the tokens' states become one vector; as in training.
        max_length: Most tokens that are read; the end of a longer text is cut off.
        batch_rows: Texts read at a time.
        told: Called with the texts done and their number.

    Raises:
        DataError: There are no texts.
    """
    if not texts:
        raise DataError("There is nothing to embed: texts is empty.")
    plain = [PlainText(str(i), text, None) for i, text in enumerate(texts)]
    cut = cut_texts(plain, tokenizer, max_length=max_length, overlong="truncate")
    rows = [TextRow(text.place, encoded.ids) for text, encoded in cut.kept]
    collator, settings = TextCollator(int(tokenizer.pad_token_id)), TrainSection(batch_rows=batch_rows)
    return outputs(model, rows, collator, settings, lambda batch: vectors(model, batch, pooling), told)
