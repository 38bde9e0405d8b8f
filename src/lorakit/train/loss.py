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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.train.collate import Collator
from lorakit.train.head_loss import head_aside, head_loss, separable_head
from lorakit.train.packing import packed
from lorakit.train.recipe import TrainSection
from lorakit.train.render import IGNORED, Rendered
from lorakit.train.row_set import R
from lorakit.train.scoring import run_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Batch = Mapping[str, Tensor]
Losses = Callable[[nn.Module, "PreTrainedModel", Batch], tuple[Tensor, Tensor]]
"""The losses of a batch, and the number of the row that each belongs to, both ``(n,)``."""


def tokens_read(batch: Batch) -> int:
    """Tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def without(batch: Batch, name: str) -> dict[str, Tensor]:
    """A batch without one of its tensors, which the model does not take."""
    return {key: tensor for key, tensor in batch.items() if key != name}


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean of a loss over all that an optimizer step teaches, however it is cut into batches.

    Attributes:
        summed: The sum of the loss over a batch; called with the model or its wrapper, the model itself, the batch.
            A scalar; where several adapters learn in one pass ``(adapters,)``.
        count: How much a batch teaches, in the same shape.
        unit: What is counted.
        each: The losses that ``summed`` adds up, and the row that each belongs to, both ``(n,)``; None where the rows
            of a batch are no strangers to each other.
        read: How much of a batch the model reads.
        joint: Whether the loss of a row depends on the rows beside it, so that a batch cannot be dealt out.
        reads: What ``read`` counts: tokens, or images.
    """

    summed: Callable[[nn.Module, PreTrainedModel, Batch], Tensor]
    count: Callable[[Batch], int | Tensor]
    unit: str
    each: Losses | None = None
    read: Callable[[Batch], int] = tokens_read
    joint: bool = False
    reads: str = "token"

    @classmethod
    def from_each(cls, each: Losses, count: Callable[[Batch], int], unit: str) -> Objective:
        """The objective whose ``summed`` adds up the losses of ``each``."""

        def summed(model: nn.Module, base: PreTrainedModel, batch: Batch) -> Tensor:
            return each(model, base, batch)[0].sum()

        return cls(summed, count, unit, each)


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
    head = separable_head(base) if model is base else None
    if head is None:
        logits, targets, _ = learnt_logits(model, base, batch)
        return F.cross_entropy(logits, targets, reduction="sum")
    with head_aside(base, head):
        hidden, targets, _ = _at_learnt(model, base, batch)
    return head_loss(hidden, head, targets)


def token_losses(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """``-log p`` of each learnt token of a batch, and the number of its row, both ``(n,)``."""
    logits, targets, rows = learnt_logits(model, base, batch)
    return F.cross_entropy(logits, targets, reduction="none"), rows


def learnt_logits(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(n, vocabulary)`` of each learnt token in float32; the tokens and their rows' numbers, both ``(n,)``."""
    logits, targets, rows = _at_learnt(model, base, batch)
    return logits.float(), targets, rows


def _at_learnt(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model gives for each learnt token ``(n, width)``; the tokens and their rows' numbers, both ``(n,)``."""
    inputs = without(batch, "labels")
    targets = next_token_labels(batch["labels"])
    learnt = targets != IGNORED
    rows = _row_numbers(batch)
    # With several rows a position is needed where any of them learns there: every model can select positions.
    needed = learnt.any(dim=0).nonzero().squeeze(1)
    keep = {"logits_to_keep": needed} if _selects_positions(type(base).forward) else {}
    with packed(base) if "cu_seq_lens_q" in batch else nullcontext():
        logits = model(**inputs, **keep, use_cache=False).logits
    if keep:
        targets, learnt, rows = targets[:, needed], learnt[:, needed], rows[:, needed]
    if not bool(learnt.all()):
        logits, targets, rows = logits[learnt], targets[learnt], rows[learnt]
    return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), rows.reshape(-1)


def _row_numbers(batch: Mapping[str, Tensor]) -> Tensor:
    """For each token ``(B, T)`` the number of its row, which in a packed batch is that of its document."""
    ids = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff().long()
        return torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths)[None]
    return torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)


def count_learnt(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of a batch are learnt."""
    return int((next_token_labels(batch["labels"]) != IGNORED).sum())


def count_labelled(batch: Batch) -> int:
    """How many labels of a batch are learnt, where each position has the label of its own output."""
    return int((batch["labels"] != IGNORED).sum())


def label_losses(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """``-log p`` of the label of each row of a batch, and the rows' numbers, both ``(rows,)``."""
    losses = F.cross_entropy(
        model(**without(batch, "labels")).logits.float(), batch["labels"], reduction="none"
    )
    return losses, torch.arange(len(losses), device=losses.device)


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """How many rows a batch has, which is how many labels it teaches."""
    return len(batch["labels"])


NEXT_TOKEN = Objective(summed_loss, count_learnt, "token", token_losses)
LABEL = Objective.from_each(label_losses, count_labels, "row")


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
    return mean_of(NEXT_TOKEN, model, rows, collator, settings, told)


def mean_of(
    objective: Objective,
    model: PreTrainedModel,
    rows: Sequence[R],
    collator: Collator,
    settings: TrainSection,
    told: Callable[[int, int], None] | None = None,
) -> float:
    """The mean of an objective over all that some rows teach; see `mean_loss`."""
    total, learnt = 0.0, 0

    def add(numbers: list[int], batch: Mapping[str, Tensor]) -> None:
        nonlocal total, learnt
        total += objective.summed(model, model, batch).item()
        learnt += int(objective.count(batch))

    run_batches(model, rows, collator, settings, add, told)
    return total / learnt


@cache
def _selects_positions(forward: Callable[..., object]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
