"""What runs along with training: a process that does nothing, and which targets are gathered into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from torch import nn

import lorakit as lk
from lorakit.core import Site, TrainingProcess


class Listed(TrainingProcess):
    def __init__(self, paths: list[str], total_steps: int) -> None:
        self.paths, self.total_steps = paths, total_steps


@dataclass(frozen=True)
class Watched(lk.LoRA):
    """LoRA with a process that knows where it is."""

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess | None:
        assert all(type(site.method) is Watched and site.parameters["lora_A"].requires_grad for site in sites)
        return Listed([site.path for site in sites], total_steps)


def model() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two", "three", "four")})


def test_a_process_of_the_base_class_does_nothing() -> None:
    process = TrainingProcess()
    process.before_forward(0)
    process.before_step(0)
    process.after_step(0)
    process.finish()
    process.load_state_dict(process.state_dict())
    assert process.penalty() == 0


def test_most_methods_need_no_process() -> None:
    adapted = model()
    lk.attach(adapted, lk.LoRA(r=2))
    assert lk.training_processes(adapted, total_steps=5) == []


def test_all_targets_of_a_method_share_one_process_wherever_they_stand() -> None:
    adapted = model()
    methods = {
        "one": Watched(r=2),
        "two": lk.DoRA(Watched(r=2)),
        "three": lk.LoRA(r=2),
        "four": Watched(r=1),
    }
    lk.attach(adapted, methods, name="a")
    processes = lk.training_processes(adapted, "a", total_steps=7)
    found = sorted((p.paths, p.total_steps) for p in processes if isinstance(p, Listed))
    assert len(processes) == 2
    assert found == [(["one", "four"], 7), (["two"], 7)]


def test_a_training_of_no_steps_is_refused() -> None:
    adapted = model()
    lk.attach(adapted, lk.LoRA(r=2))
    with pytest.raises(lk.LorakitError, match="total_steps"):
        lk.training_processes(adapted, total_steps=0)
    with pytest.raises(lk.LorakitError, match="No adapter"):
        lk.training_processes(adapted, "b", total_steps=1)
