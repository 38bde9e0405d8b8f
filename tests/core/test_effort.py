"""The steps that the patterns of a file share."""

from __future__ import annotations

import pytest

from lorakit.core.effort import Effort, current_effort, shared_effort, take_steps
from lorakit.errors import ConfigError


def test_steps_run_out_with_a_message_that_says_where() -> None:
    effort = Effort(10)
    effort.take(10, "a*")
    with pytest.raises(ConfigError, match=r"'a\*' takes too many steps to be matched with 'path'"):
        effort.take(1, "a*", "path")
    with pytest.raises(ConfigError, match="too many steps to be read"):
        effort.take(1, "x" * 9_000)


def test_blocks_inside_share_with_the_outer_one_and_each_file_begins_anew() -> None:
    take_steps(10**12, "a")  # nothing is being read
    with shared_effort():
        outer = current_effort()
        assert outer is not None
        whole = outer.left
        with shared_effort():
            take_steps(5, "a")
        assert current_effort() is outer
        assert outer.left == whole - 5
    assert current_effort() is None
    with pytest.raises(ConfigError), shared_effort():
        take_steps(whole + 1, "a")
    with shared_effort():
        take_steps(whole, "a")
