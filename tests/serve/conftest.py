"""An engine whose runner a test can hold up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorakit.serve.engine import Engine
from lorakit.serve.scheduler import EngineLimits
from tests.serve.tiny_serving import byte_tokenizer
from tests.serve.watched_runner import Watched


@pytest.fixture
def runner() -> Watched:
    return Watched()


@pytest.fixture
def engine(runner: Watched) -> Iterator[Engine]:
    """Everything that a test asked for must have been given back at its end."""
    limits = EngineLimits(running=6, step_tokens=32, waiting=8, unread_events=64)
    with Engine(runner, byte_tokenizer(), limits=limits) as made:
        yield made
        runner.gate.set()
    assert runner.arena.used == 0
    assert not made._jobs
