"""From rows to the tensors of a batch: packed end to end, or padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from lorakit.core import Method
from lorakit.errors import ConfigError
from lorakit.train.packing import pack, packing_error
from lorakit.train.render import IGNORED, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackedCollator:
    """Rows end to end in one row; there is no padding."""

    padded: ClassVar[bool] = False

    def __call__(self, rows: Sequence[Rendered]) -> dict[str, Tensor]:
        """``input_ids``, ``position_ids`` and ``labels`` ``(1, T)``, and the borders of the documents."""
        labels = torch.tensor([label for row in rows for label in row.labels])[None]
        return {**pack([row.ids for row in rows]), "labels": labels}


@dataclass(frozen=True)
class PaddedCollator:
    """Rows side by side, padded on the right to the longest; padding is masked and never labelled."""

    pad: int
    padded: ClassVar[bool] = True

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(rows, longest)``, ``labels`` ``(rows, most labels)``.

        Labels are one a token, or what an encoder-decoder writes, which is longer or shorter than what it reads.
        """
        labels = side_by_side([row.labels for row in rows], IGNORED)
        return {**text_batch([row.ids for row in rows], self.pad), "labels": labels}


@dataclass(frozen=True)
class LabelCollator:
    """Texts to classify side by side, padded on the right to the longest of their batch."""

    pad: int
    padded: ClassVar[bool] = True

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, perhaps ``token_type_ids`` ``(rows, longest)``; ``labels`` ``(rows,)``."""
        batch = text_batch([row.ids for row in rows], self.pad)
        batch["labels"] = torch.tensor([row.labels[0] for row in rows])
        if all(row.types is not None for row in rows):
            batch["token_type_ids"] = side_by_side([row.types or () for row in rows], 0)
        return batch


def text_batch(texts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(texts, longest)``, padded on the right."""
    return {
        "input_ids": side_by_side(texts, pad),
        "attention_mask": side_by_side([[1] * len(ids) for ids in texts], 0),
    }


def side_by_side(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Sequences as one ``(rows, longest)`` tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


class Collator(Protocol):
    """Makes the tensors of a batch from its rows."""

    @property
    def padded(self) -> bool:
        """Whether rows are filled up to the longest of their batch, so that rows of like length should meet."""

    def __call__(self, rows: Sequence[Any], /) -> dict[str, Tensor]:
        """The batch."""


def choose_collator(
    batching: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Iterable[Method] = (),
) -> tuple[Collator, str | None]:
    """The collator that a recipe asks for, and why it is not the packed one where ``auto`` could not take that.

    Args:
        batching: What the recipe asks for.
        model: With or without adapters.
        tokenizer: Its tokenizer.
        methods: What will be attached to it.

    Raises:
        ConfigError: ``packed`` is asked for, and the model cannot be packed.
    """
    padded = PaddedCollator(int(tokenizer.pad_token_id))
    if batching == "padded":
        return padded, None
    odd = next((method.name for method in methods if not method.packable), None)
    reason = (
        packing_error(model) if odd is None else f"{odd} tuning cannot tell the texts of a packed row apart"
    )
    if reason is None:
        return PackedCollator(), None
    if batching == "packed":
        raise ConfigError(f"train.batching is packed, but {reason}. Set it to padded, or to auto.")
    return padded, reason
