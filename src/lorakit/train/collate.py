"""From rows to the tensors of a batch: packed end to end, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.train.packing import pack, packing_error
from lorakit.train.render import IGNORED, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackedCollator:
    """Rows end to end in one row; there is no padding."""

    def __call__(self, rows: Sequence[Rendered]) -> dict[str, Tensor]:
        """``input_ids``, ``position_ids`` and ``labels`` ``(1, T)``, and the borders of the documents."""
        labels = torch.tensor([label for row in rows for label in row.labels])[None]
        return {**pack([row.ids for row in rows]), "labels": labels}


@dataclass(frozen=True)
class PaddedCollator:
    """Rows side by side, padded on the right to the longest; padding is masked and never labelled."""

    pad: int

    def __call__(self, rows: Sequence[Rendered]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, longest)``."""
        longest = max(len(row.ids) for row in rows)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (longest - len(values))]

        return {
            "input_ids": torch.tensor([padded(row.ids, self.pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.ids), 0) for row in rows]),
            "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        }


Collator = PackedCollator | PaddedCollator


def choose_collator(
    batching: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Collator, str | None]:
    """The collator that a recipe asks for, and why it is not the packed one where ``auto`` could not take that.

    Raises:
        ConfigError: ``packed`` is asked for, and the model cannot be packed.
    """
    padded = PaddedCollator(int(tokenizer.pad_token_id))
    if batching == "padded":
        return padded, None
    reason = packing_error(model)
    if reason is None:
        return PackedCollator(), None
    if batching == "packed":
        raise ConfigError(f"train.batching is packed, but {reason}. Set it to padded, or to auto.")
    return padded, reason
