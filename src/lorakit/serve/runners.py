"""Which runner a base gets, and what rounding its weights costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lorakit.errors import ConfigError, KernelError, ModelError
from lorakit.serve.native_model import Storage
from lorakit.serve.native_runner import NativeRunner
from lorakit.serve.runner import ModelRunner, Piece, Segment, StepBatch
from lorakit.serve.transformers_runner import TransformersRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RunnerKind = Literal["auto", "native", "transformers"]

# What the cost of rounding is measured on: our own words, on many things.
_TEXT = """\
The river had risen in the night, and by morning the lower road was under water. Three farmers stood at the bridge
and argued about whose turn it was to call the engineer. In a computer, a number is kept as a row of bits; the fewer
bits there are, the coarser the numbers become, and the more of them fit into the same memory. To make bread for six
people, mix 500 grams of flour, 330 grams of water, 10 grams of salt and a little yeast, wait until it has doubled,
and bake it at 230 degrees for about forty minutes. She opened the letter twice before she believed it: the museum
wanted the painting back, and offered to pay for the journey. def area(width, height): return width * height. The
capital of Portugal is Lisbon; that of Norway is Oslo. When the light is red, cars stop, and people cross the
street. Prices rose by two percent last year, which was less than most economists had expected, although rents went
up faster than wages."""


@dataclass(frozen=True)
class RoundingCost:
    """What weights in int8 change, on a text of a few hundred tokens.

    Attributes:
        tokens: Of the text.
        divergence: Mean Kullback-Leibler divergence of the next token's distribution, in nats.
        agreement: Share of the places where the likeliest token is the same.
        perplexity: Of the base.
        rounded_perplexity: Of the base in int8.
    """

    tokens: int
    divergence: float
    agreement: float
    perplexity: float
    rounded_perplexity: float

    def __str__(self) -> str:
        return (
            f"int8 weights, on {self.tokens} tokens of plain text: perplexity {self.perplexity:.2f} -> "
            f"{self.rounded_perplexity:.2f}, the likeliest next token is the same at {self.agreement:.1%} of the "
            f"places, divergence {self.divergence:.4f} nats"
        )


def make_runner(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kind: RunnerKind = "auto",
    weights: Storage = "fp32",
    kv_tokens: int = 16_384,
    context: int | None = None,
    threads: int | None = None,
) -> tuple[ModelRunner, str]:
    """The fastest runner that can run a model, and a sentence that says which one it is and why.

    Args:
        model: The base; the runner owns it from now on.
        tokenizer: Its tokenizer, for measuring what int8 costs.
        kind: ``"native"`` (the compiled step) and ``"transformers"`` insist; ``"auto"`` takes the first where it can.
        weights: ``"int8"`` is done by the compiled step alone.
        kv_tokens: Room for keys and values, in tokens, of all running requests together.
        context: The most tokens of one request; by default what the model allows.
        threads: Of the compiled step; by default as many as torch uses.

    Raises:
        ModelError: No runner can run the model, or not the one that was asked for.
        KernelError: The compiled step is not there.
        ConfigError: A word that means nothing, or int8 beside ``"transformers"``.
    """
    if weights not in ("fp32", "int8"):
        raise ConfigError(f"weights is 'fp32' or 'int8'; got {weights!r}.")
    if kind not in ("auto", "native", "transformers"):
        raise ConfigError(f"runner is 'auto', 'native' or 'transformers'; got {kind!r}.")
    if kind == "transformers":
        if weights != "fp32":
            raise ConfigError(
                "Only the compiled runner keeps weights as int8; runner='transformers' has fp32."
            )
        return TransformersRunner(model, kv_tokens=kv_tokens, context=context), "transformers' own layers"
    before = None if weights == "fp32" or tokenizer is None else _measured_text(model, tokenizer)
    try:
        runner = NativeRunner(model, kv_tokens=kv_tokens, context=context, storage=weights, threads=threads)
    except (KernelError, ModelError) as error:
        if kind == "native" or weights != "fp32":
            raise
        return TransformersRunner(
            model, kv_tokens=kv_tokens, context=context
        ), f"transformers' own layers ({str(error).rstrip('.')})"
    told = f"the compiled step, {runner.threads} threads"
    if before is not None:
        told += f"; {rounding_cost(runner, *before)}"
    return runner, told


@torch.inference_mode()
def _measured_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Tokens ``(n,)`` of the text, and the logits ``(n, vocabulary)`` of the model itself."""
    ids = tokenizer(" ".join(_TEXT.split()), return_tensors="pt").input_ids[0]
    ids = ids[: int(getattr(model.config, "max_position_embeddings", len(ids)))]
    return ids, model(input_ids=ids[None], use_cache=False).logits[0].float()


def rounding_cost(runner: ModelRunner, tokens: Tensor, own: Tensor) -> RoundingCost:
    """Compare a runner with the logits of the model itself.

    Args:
        runner: Of the rounded base.
        tokens: A text, ``(n,)``.
        own: The base's own logits, ``(n, vocabulary)``.
    """
    n = min(len(tokens), runner.context)
    tokens, own = tokens[:n], own[:n]
    slab = runner.arena.reserve(n)
    if slab is None:
        raise ConfigError("The cache is in use; the cost of rounding is measured before anything is served.")
    try:
        batch = StepBatch(
            tokens, torch.arange(n), [Segment(0, n, None)], [Piece(0, n, 0, slab)], torch.arange(n)
        )
        rounded = runner.step(batch)
    finally:
        slab.free()
    a, b = own.log_softmax(-1), rounded.log_softmax(-1)
    next_one = tokens[1:, None]
    return RoundingCost(
        tokens=n,
        divergence=float((a.exp() * (a - b)).sum(-1).mean()),
        agreement=float((own.argmax(-1) == rounded.argmax(-1)).float().mean()),
        perplexity=math.exp(-float(a[:-1].gather(1, next_one).mean())),
        rounded_perplexity=math.exp(-float(b[:-1].gather(1, next_one).mean())),
    )
