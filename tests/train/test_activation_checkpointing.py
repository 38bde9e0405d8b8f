"""Activation checkpointing where it is asked for, or where a step would not fit without it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.errors import ModelError
from lorakit.train import Recipe, train
from lorakit.train import activation_checkpointing as tested
from lorakit.train.activation_checkpointing import wants_checkpointing
from lorakit.train.progress import Silent

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def needs(size: int) -> Callable[[], Any]:
    return lambda: SimpleNamespace(training=SimpleNamespace(above_weights=size))


def test_asked_or_not() -> None:
    def plan() -> Any:
        raise AssertionError("nobody needs to plan")

    said: list[str] = []
    assert wants_checkpointing(True, plan, CPU, said.append) is True
    assert wants_checkpointing(False, plan, CPU, said.append) is False
    assert said == []


@pytest.mark.parametrize(("need", "wanted"), [(8 * 10**9, False), (95 * 10**8, True)])
def test_what_fits(need: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "memory", lambda: (2 * 10**10, 10**10))
    said: list[str] = []
    assert wants_checkpointing("auto", needs(need), CPU, said.append) is wanted
    assert said == [
        f"activation checkpointing is {'on' if wanted else 'off'}: a step without it needs about {need / 1e9:.1f} GB "
        "beside the weights, and 10.0 GB are free"
    ]


def test_what_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Any:
        raise ModelError("no such forward")

    said: list[str] = []
    assert not wants_checkpointing("auto", unknown, CPU, said.append)
    monkeypatch.setattr(tested, "memory", lambda: (0, 0))
    assert not wants_checkpointing("auto", needs(1), CPU, said.append)
    assert [line.partition(":")[0] for line in said] == ["activation checkpointing is off"] * 2
    assert "no such forward" in said[0]


def test_a_run_in_little_memory_is_the_same_run(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(recipe("plain", max_steps=3))
    monkeypatch.setattr(tested, "memory", lambda: (10**6, 10**4))
    runs: list[bool] = []
    original = tested.checkpoint_activations
    monkeypatch.setattr(
        "lorakit.train.trainer.checkpoint_activations",
        lambda model, wanted: (runs.append(wanted), original(model, wanted)),
    )
    lines = Lines()
    small = train(recipe("small", max_steps=3, activation_checkpointing="auto"), progress=lines)
    assert runs == [True, False]
    assert small.losses == plain.losses
    assert any(line.startswith("activation checkpointing is on") for line in lines.lines)
