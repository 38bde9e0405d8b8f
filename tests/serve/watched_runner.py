"""A runner that a test can hold up and make fail, and the wait for what it then does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from lorakit.serve.runner import StepBatch
from lorakit.serve.transformers_runner import TransformersRunner
from tests.serve.tiny_serving import tiny_decoder, versions_of

STOCK = tiny_decoder("llama")
VERSIONS = versions_of(STOCK)


class Watched:
    """A runner that can be held up, and made to fail for steps that a test picks."""

    def __init__(self) -> None:
        self.inner = TransformersRunner(tiny_decoder("llama"), kv_tokens=2048)
        self.arena, self.vocabulary, self.context = (
            self.inner.arena,
            self.inner.vocabulary,
            self.inner.context,
        )
        self.prepare, self.forget = self.inner.prepare, self.inner.forget
        self.gate = threading.Event()
        self.gate.set()
        self.spoil: Callable[[StepBatch], None] = lambda batch: None
        self.batches: list[int] = []

    def step(self, batch: StepBatch) -> torch.Tensor:
        assert self.gate.wait(30)
        self.batches.append(len(batch.pieces))
        self.spoil(batch)
        return self.inner.step(batch)


def steps_until(condition: Callable[[], bool]) -> None:
    """Wait for it, and not for ever."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
