"""One thread for a while."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops.threads import one_thread


def test_the_number_comes_back_also_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="x"), one_thread():
            raise ValueError("x")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
