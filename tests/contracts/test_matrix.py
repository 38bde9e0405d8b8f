"""The support matrix in the documentation is the one that the methods give."""

from __future__ import annotations

import pytest

from tests.contracts.matrix import PAGE, page


def test_the_page_is_up_to_date() -> None:
    pytest.importorskip("bitsandbytes")  # has a column of its own
    assert PAGE.read_text("utf-8") == page(), (
        "run `python -m tests.contracts.matrix` and look at the difference"
    )
