"""The search for garbage is put off and taken up again."""

from __future__ import annotations

import gc

import pytest

from lorakit.garbage import seldom_collected


def test_it_is_put_off_inside_and_as_before_after_an_error() -> None:
    before, inside = gc.get_threshold(), []

    def start() -> None:
        with seldom_collected():
            with seldom_collected():
                pass
            inside.append(gc.get_threshold()[0])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        start()
    assert inside[0] > 100 * before[0]
    assert gc.get_threshold() == before


def test_little_is_left_even_where_there_is_much_garbage() -> None:
    with seldom_collected():
        done = gc.get_stats()[0]["collections"]
        for _ in range(2 * 10**6):
            cycle: list[object] = []
            cycle.append(cycle)
        assert gc.get_stats()[0]["collections"] > done


def test_blocks_of_two_threads_that_overlap_leave_it_as_before() -> None:
    before = gc.get_threshold()
    first, second = seldom_collected(), seldom_collected()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] > 100 * before[0]
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
