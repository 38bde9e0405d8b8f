"""A method's own process runs at its places in the loop, and goes on bit for bit after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lorakit.core import METHODS, DeltaMethod, Shape, Site, Target, TrainingProcess, register
from lorakit.errors import ConfigError, TrainingError
from lorakit.train import Recipe, read_metrics, train
from lorakit.train.run_files import checkpoints
from tests.train.test_trainer import StopAt, assert_equal, tensors

MakeRecipe = Callable[..., Recipe]
CALLS: list[tuple[str, int]] = []


@dataclass(frozen=True)
class Shift(DeltaMethod):
    """Adds a vector to every column of the weight.

    Attributes:
        weight_of_penalty: On the sum of squares of the vector, pulled towards 1.
        noise: Whether each step's gradient is multiplied by a number that is drawn for it.
        most_steps: Longest training that it fits.
    """

    weight_of_penalty: float = 0.0
    noise: bool = False
    most_steps: int = 100

    roles: ClassVar[Mapping[str, str]] = {"shift": "B"}

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {"shift": (*shape.batch, shape.out, 1)}

    def start(
        self, target: Target, generator: torch.Generator | None, shared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"shift": torch.zeros(self.shapes(target.shape)["shift"])}

    def delta(self, target: Target, p: Mapping[str, Tensor]) -> Tensor:
        return p["shift"].expand(*target.batch, target.out, target.in_)

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess | None:
        if total_steps > self.most_steps:
            raise ConfigError(f"Shift fits {self.most_steps} steps; these are {total_steps}.")
        return ShiftProcess(self, [site.parameters["shift"] for site in sites], total_steps)


class ShiftProcess(TrainingProcess):
    def __init__(self, method: Shift, vectors: Sequence[Tensor], total_steps: int) -> None:
        self.method, self.vectors = method, vectors
        self.generator = torch.Generator().manual_seed(0)
        self.factor, self.seen = 1.0, torch.zeros(())
        CALLS.append(("total", total_steps))

    def before_forward(self, step: int) -> None:
        CALLS.append(("before_forward", step))
        if self.method.noise:
            self.factor = float(torch.rand((), generator=self.generator))

    def penalty(self) -> Tensor | float:
        CALLS.append(("penalty", -1))
        if not self.method.weight_of_penalty:
            return 0.0
        return self.method.weight_of_penalty * sum((v - 1).square().sum() for v in self.vectors)

    def before_step(self, step: int) -> None:
        CALLS.append(("before_step", step))
        for vector in self.vectors:
            assert vector.grad is not None
            vector.grad.mul_(self.factor)

    def after_step(self, step: int) -> None:
        CALLS.append(("after_step", step))
        for vector in self.vectors:
            assert vector.grad is not None
            self.seen = self.seen + vector.grad.abs().sum()
            with torch.no_grad():  # what was seen so far acts on what follows, so a resume must bring it
                vector.add_(1e-4 * torch.tanh(self.seen))

    def finish(self) -> None:
        CALLS.append(("finish", -1))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.seen = state["seen"]


@pytest.fixture(autouse=True)
def shift() -> Iterator[None]:
    known = dict(METHODS)
    register("shift")(Shift)
    CALLS.clear()
    yield
    METHODS.clear()
    METHODS.update(known)


def settings(**method: Any) -> dict[str, Any]:
    return {
        "sections": {"adapter": {"method": "shift", "targets": ["q_proj", "v_proj"], **method}},
        "lr": 1e-2,
    }


def test_each_call_comes_at_its_place_once_in_an_optimizer_step(recipe: MakeRecipe) -> None:
    train(recipe(max_steps=2, accumulation=3, **settings()))
    step = [("before_forward", 0), ("penalty", -1), ("before_step", 0), ("after_step", 0)]
    second = [(name, 1 if number == 0 else number) for name, number in step]
    expected = [("total", 2), *step, *second, ("finish", -1)]
    assert expected == CALLS


def test_the_penalty_acts_on_the_gradient_once_and_is_reported_apart(recipe: MakeRecipe) -> None:
    common: dict[str, Any] = {"max_steps": 30, "log_every": 1, "schedule": "constant", "warmup": 0}
    plain = train(recipe("plain", **common, **settings()))
    pulled = train(recipe("pulled", **common, accumulation=2, **settings(weight_of_penalty=100.0)))
    lines = read_metrics(pulled.folder / "metrics.jsonl")
    vectors = [t for name, t in tensors(pulled.adapter).items()]
    count = sum(v.numel() for v in vectors)
    assert lines[0]["penalty"] == pytest.approx(100.0 * count, rel=1e-5)  # all are 0 at the start
    assert lines[-1]["penalty"] < lines[0]["penalty"]
    assert all(v.mean() > 0.2 for v in vectors)  # pulled towards 1 by 30 steps of 0.01
    assert all("penalty" not in line for line in read_metrics(plain.folder / "metrics.jsonl"))
    whole = train(recipe("whole", **{**common, "batch_rows": 8}, **settings()))
    assert pulled.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)  # the loss is that of the task alone
    for vector in tensors(plain.adapter).values():
        assert vector.abs().max() < 0.35


def test_the_gradient_is_what_the_process_made_of_it(recipe: MakeRecipe) -> None:
    """With plain AdamW a factor on the gradient cancels in the first step, and not in the second."""
    one = train(recipe("one", max_steps=3, **settings()))
    two = train(recipe("two", max_steps=3, **settings(noise=True)))
    assert one.losses[:1] == two.losses[:1]
    assert one.losses != two.losses


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_takes_up_the_state_of_its_processes(recipe: MakeRecipe, stop: int) -> None:
    common: dict[str, Any] = {"max_steps": 7, "log_every": 3, "save_every": 3}
    method = settings(noise=True, weight_of_penalty=0.1)
    whole = train(recipe("whole", **common, **method))
    stopped = train(recipe("parts", **common, **method), progress=StopAt(stop))
    assert stopped.stopped_by == "interrupt"
    assert CALLS[-1] == ("finish", -1)
    CALLS.clear()
    resumed = train(recipe("parts", **common, **method), resume=True)
    assert CALLS[:2] == [("total", 7), ("before_forward", stop)]
    assert resumed.losses == whole.losses
    assert_equal(resumed.adapter, whole.adapter)

    def penalties(result: Any) -> list[float]:
        return [line["penalty"] for line in read_metrics(result.folder / "metrics.jsonl")]

    assert penalties(resumed) == penalties(whole)


def test_a_checkpoint_without_the_state_is_refused(recipe: MakeRecipe) -> None:
    result = train(recipe(max_steps=4, save_every=2, **settings()))
    (checkpoints(result.folder)[-1] / "lorakit_processes.pt").unlink()
    with pytest.raises(TrainingError, match="holds the state of 0 training processes; the adapter has 1"):
        train(recipe(max_steps=4, save_every=2, **settings()), resume=True)


def test_what_does_not_fit_the_number_of_steps_is_told_before_anything_is_written(recipe: MakeRecipe) -> None:
    made = recipe(max_steps=4, **settings(most_steps=3))
    with pytest.raises(ConfigError, match="fits 3 steps; these are 4"):
        train(made)
    assert not made.output.exists()
