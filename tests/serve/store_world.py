"""A small base and adapters for it on disk, for tests of the adapter store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit as lk
from lorakit.core import AdapterState, Method
from lorakit.serve.base_facts import BaseFacts, base_facts
from lorakit.serve.store import AdapterStore


class Base(nn.Module):
    """Two layers of linear maps and a table."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
            for _ in range(layers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return x


def facts(**sizes: int) -> BaseFacts:
    return base_facts(Base(**sizes), name="tiny")


def make_state(
    seed: int, method: Method | None = None, *, targets: Any = ("up", "down"), **sizes: int
) -> AdapterState:
    """An adapter whose numbers the seed decides, all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Base(**sizes)
        lk.attach(base, method or lk.LoRA(r=4, alpha=8), list(targets))
        for p in lk.trainable(base).values():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) / 8
        return lk.extract(base)


def write(folder: Path, seed: int, method: Method | None = None, **sizes: Any) -> AdapterState:
    state = make_state(seed, method, **sizes)
    lk.save(state, folder)
    return state


def same(a: AdapterState, b: AdapterState) -> bool:
    """Whether two states hold the same numbers in the same places."""
    left = {(path, name): t for path, name, t in a.all_tensors()}
    right = {(path, name): t for path, name, t in b.all_tensors()}
    return set(left) == set(right) and all(torch.equal(t, right[key]) for key, t in left.items())


def new_store(root: Path | None, **settings: Any) -> AdapterStore:
    quick = {"capacity_wait": 0.5, "patience": 0.1, "load_timeout": 20.0}
    return AdapterStore(root, settings.pop("base", None) or facts(), **{**quick, **settings})


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def in_memory(store: AdapterStore) -> Mapping[str, int]:
    """Digest to bytes of what is in memory, straight from the store's own records."""
    contents = store._memory.contents.values()
    return {content.digest: content.bytes for content in contents if content.version is not None}
