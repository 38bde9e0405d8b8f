"""Batches as tensors."""

from __future__ import annotations

from lorakit.train.collate import PackedCollator, PaddedCollator
from lorakit.train.render import Rendered

ROWS = [Rendered("a", (5, 6, 7), (-100, 6, 7)), Rendered("b", (8, 2), (-100, 2))]


def test_packed() -> None:
    batch = PackedCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert "attention_mask" not in batch


def test_padding_is_masked_by_position_though_a_label_may_equal_it() -> None:
    batch = PaddedCollator(pad=2)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 2, -100]]
