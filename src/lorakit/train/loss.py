"""The loss of a batch: cross-entropy of the learnt tokens, with logits at their positions only, or of the labels.

With a vocabulary of 49,152 the head is a third of a small model's work, and only the positions before learnt tokens
need it. The result is the same to the last bit of the sum's order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.train.collate import Collator, PaddedCollator
from lorakit.train.packing import packed
from lorakit.train.recipe import TrainSection
from lorakit.train.render import IGNORED, Rendered
from lorakit.train.scoring import run_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean of a loss over all that an optimizer step teaches, however it is cut into batches.

    Attributes:
        summed: The sum of the loss over a batch; called with the model or its wrapper, the model itself, the batch.
        count: How much a batch teaches.
        unit: What is counted.
    """

    summed: Callable[[nn.Module, PreTrainedModel, Mapping[str, Tensor]], Tensor]
    count: Callable[[Mapping[str, Tensor]], int]
    unit: str


def next_token_labels(labels: Tensor) -> Tensor:
    """For each position the label of the token after it, ``(B, T)``; the last of a row has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of ``-log p`` over the learnt tokens of a batch; a scalar.

    Args:
        model: What is called: the model, or a wrapper of it.
        base: The model itself.
        batch: What a collator made. A packed batch has ``cu_seq_lens_q``.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = next_token_labels(batch["labels"])
    learnt = targets != IGNORED
    # With several rows a position is needed where any of them learns there: every model can select positions.
    needed = learnt.any(dim=0).nonzero().squeeze(1)
    keep = {"logits_to_keep": needed} if _selects_positions(type(base).forward) else {}
    with packed(base) if "cu_seq_lens_q" in batch else nullcontext():
        logits = model(**inputs, **keep, use_cache=False).logits
    if keep:
        targets, learnt = targets[:, needed], learnt[:, needed]
    if not bool(learnt.all()):
        logits, targets = logits[learnt], targets[learnt]
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        reduction="sum",
        ignore_index=IGNORED,
    )


def count_learnt(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of a batch are learnt."""
    return int((next_token_labels(batch["labels"]) != IGNORED).sum())


def summed_label_loss(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of ``-log p`` over the labels ``(rows,)`` of a batch; a scalar."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="sum")


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """How many rows a batch has, which is how many labels it teaches."""
    return len(batch["labels"])


NEXT_TOKEN = Objective(summed_loss, count_learnt, "token")
LABEL = Objective(summed_label_loss, count_labels, "row")


def mean_loss(
    model: PreTrainedModel,
    rows: Sequence[Rendered],
    collator: Collator,
    settings: TrainSection,
    told: Callable[[int, int], None] | None = None,
) -> float:
    """The mean of ``-log p`` over all learnt tokens of some rows, in nats; the model's train/eval mode is put back.

    Args:
        model: With whatever adapters act.
        rows: What to score.
        collator: How batches are made; it does not change the result.
        settings: For the size of the batches.
        told: Called with the rows done and their number.
    """
    total, learnt = 0.0, 0

    def add(numbers: list[int], batch: Mapping[str, Tensor]) -> None:
        nonlocal total, learnt
        total += summed_loss(model, model, batch).item()
        learnt += count_learnt(batch)

    run_batches(model, rows, collator, settings, add, padded=isinstance(collator, PaddedCollator), told=told)
    return total / learnt


@cache
def _selects_positions(forward: Callable[..., object]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
