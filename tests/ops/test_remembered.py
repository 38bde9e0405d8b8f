"""A remembered result is used as long as it is right, and is forgotten with its owner."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit.ops.remembered import Remembered, tensors_in


class Sum:
    """Counts how often it is computed."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.count, self.memory = tensors, 0, Remembered[Tensor]()

    def __call__(self, by: object = None, place: object = "here") -> Tensor:
        def compute() -> Tensor:
            self.count += 1
            return torch.stack([t.detach().sum() for t in self.tensors]).sum()

        return self.memory.recall(self.tensors[0], place, self.tensors, by, compute)


def frozen(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values), requires_grad=False)


def test_it_is_computed_once() -> None:
    total = Sum(frozen(1.0, 2.0), frozen(3.0))
    assert [float(total()) for _ in range(3)] == [6.0] * 3
    assert total.count == 1
    assert len(total.memory) == 1


def write_in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.add_(1)


def write_in_inference_mode(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.add_(1)


def write_a_row(p: nn.Parameter) -> None:
    with torch.no_grad():
        p[0] += 1


def copy_in(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.copy_(p + 1)


def other_data(p: nn.Parameter) -> None:
    p.data = p.data + 1


def through_a_view(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.view(-1)[0] += 1


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "write",
    [write_in_place, write_in_inference_mode, write_a_row, copy_in, other_data, through_a_view],
    ids=lambda write: write.__name__,
)
def test_a_change_of_any_tensor_is_seen(which: int, write: Callable[[nn.Parameter], None]) -> None:
    tensors = frozen(1.0, 2.0), frozen(3.0)
    total = Sum(*tensors)
    before = float(total())
    write(tensors[which])
    assert float(total()) == sum(float(t.sum()) for t in tensors) != before
    assert total.count == 2


def test_casting_there_and_back_is_seen() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    for _ in range(20):  # the old address is free again, and sometimes taken again
        with torch.no_grad():
            layer.weight.normal_()
        total = Sum(layer.weight)
        total()
        layer.bfloat16().float()
        assert float(total()) == float(layer.weight.sum())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("when", ["after", "between"])
def test_an_optimizer_step_is_seen(fused: bool, when: str) -> None:
    """Fused optimizers change a parameter without raising its version."""
    p = nn.Parameter(torch.ones(3))
    total = Sum(p)
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
    with torch.no_grad():
        assert float(total()) == 3.0
    total()  # a forward pass that is trained
    p.square().sum().backward()
    if when == "between":
        with torch.no_grad():
            total()
    optimizer.step()
    with torch.no_grad():
        assert float(total()) == float(p.detach().sum()) != 3.0
    optimizer.zero_grad()
    with torch.no_grad():
        total()
        count = total.count
        assert float(total()) == float(p.detach().sum())
        assert total.count == count, "no gradient is left: it is remembered again"


def test_nothing_is_remembered_while_it_could_be_trained() -> None:
    p = nn.Parameter(torch.ones(3))
    total = Sum(p)
    for _ in range(2):
        total()
    assert (total.count, len(total.memory)) == (2, 0)
    with torch.no_grad():
        total(), total()
    assert (total.count, len(total.memory)) == (3, 1)


def test_inference_tensors_are_computed_each_time() -> None:
    with torch.inference_mode():
        t = torch.ones(3)
        total = Sum(t)
        total()
        t.add_(1)
        assert float(total()) == 6.0
    assert total.count == 2


def test_what_was_computed_in_inference_mode_can_be_trained_through() -> None:
    total = Sum(frozen(1.0, 2.0))
    with torch.inference_mode():
        total()
    x = torch.ones((), requires_grad=True)
    (x * total()).backward()
    assert float(x.grad) == 3.0  # type: ignore[arg-type]
    assert total.count == 1


def test_another_computation_is_not_taken_for_it() -> None:
    total = Sum(frozen(1.0))
    one, two = object(), object()
    for by, place, count in ((one, 0, 1), (two, 0, 2), (two, 0, 2), (two, 1, 3), (two, 0, 3)):
        total(by, place)
        assert total.count == count


def test_another_tensor_at_the_same_place_is_not_taken_for_it() -> None:
    memory = Remembered[float]()
    owner, one, two = frozen(0.0), frozen(1.0), frozen(2.0)
    for t in (one, two, one):
        assert memory.recall(owner, 0, (owner, t), None, t.sum().item) == float(t)


def test_it_keeps_nothing_alive_and_dies_with_its_owner() -> None:
    memory = Remembered[Tensor]()
    owner, other = frozen(1.0), frozen(2.0)
    memory.recall(owner, 0, (owner, other), None, lambda: torch.zeros(()))
    del other
    gc.collect()
    assert len(memory) == 1
    del owner
    gc.collect()
    assert len(memory) == 0
    assert not memory._tables


def test_a_copy_of_the_tensors_has_nothing_to_recall() -> None:
    p = frozen(1.0)
    total = Sum(p)
    total()
    twin = Sum(copy.deepcopy(p))
    twin.memory = total.memory
    twin()
    assert twin.count == 1
    assert len(total.memory) == 2


def test_forgetting() -> None:
    p = frozen(1.0)
    total = Sum(p)
    total()
    p.data.fill_(5)  # leaves no trace
    assert float(total()) == 1.0
    total.memory.forget(p)
    assert float(total()) == 5.0


def test_tensors_are_gathered_from_mappings() -> None:
    p = frozen(1.0)
    assert tensors_in({"a": p, "b": None}, {"c": 3}) == (p,)
