"""AdaLoRA's budget: the paper's tables, who survives, and that it ends where it should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, TrainingError
from lorakit.methods.adalora_allocator import BudgetSchedule, RankAllocator, Triplets
from tests.methods.adalora_training import attached, model_and_batches, nonzero, train


# ---- the schedule
@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (
            BudgetSchedule(144, 96, 100, 10, 10),
            {10: 144, 20: 128, 30: 116, 46: 103, 50: 102, 80: 96, 91: 96},
        ),
        (
            BudgetSchedule(864, 576, 3000, 500, 1500),
            {500: 864, 510: 855, 1000: 612, 1250: 580, 1490: 576},
        ),
    ],
    ids=["short", "paper"],
)
def test_the_budget_tables(schedule: BudgetSchedule, table: dict[int, int]) -> None:
    assert {step: schedule.budget(step) for step in table} == table


def test_masks_fall_on_every_deltaT_th_step_and_on_all_of_the_final_phase() -> None:
    schedule = BudgetSchedule(12, 4, 20, 3, 5, 4)
    assert [step for step in range(20) if schedule.masks(step)] == [4, 8, 12, 15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("given_steps", "expected"),
    [
        ((100, None, None), (10, 50)),
        ((30, None, 5), (5, 5)),
        ((30, 20, None), (20, 5)),
        ((2, None, None), (0, 1)),
        ((3, None, None), (0, 1)),
        ((30, 0, 1), (0, 1)),
    ],
    ids=str,
)
def test_what_is_not_given_is_derived(given_steps: tuple[int, Any, Any], expected: tuple[int, int]) -> None:
    total, tinit, tfinal = given_steps
    schedule = BudgetSchedule.fitted(start=12, end=4, total_steps=total, tinit=tinit, tfinal=tfinal, deltaT=1)
    assert (schedule.tinit, schedule.tfinal) == expected


@pytest.mark.parametrize(
    ("method", "total", "message"),
    [
        (lk.AdaLoRA(init_r=6, target_r=2, tfinal=0), 30, "tfinal=0 would"),
        (
            lk.AdaLoRA(init_r=6, target_r=2, tinit=20, tfinal=10),
            30,
            "tinit=20 and tfinal=10 leave no step of 30",
        ),
        (lk.AdaLoRA(init_r=6, target_r=2), 1, "leave no step of 1"),
    ],
    ids=["no-final-phase", "no-middle-phase", "one-step"],
)
def test_a_schedule_that_does_not_fit_is_refused(method: lk.AdaLoRA, total: int, message: str) -> None:
    model, _ = model_and_batches(0)
    with pytest.raises(ConfigError, match=message):
        attached(model, method, total)


def test_targets_of_one_budget_agree_on_its_schedule() -> None:
    model, _ = model_and_batches(0)
    lk.attach(model, {"a": lk.AdaLoRA(init_r=6, target_r=2), "b": lk.AdaLoRA(init_r=6, target_r=2, deltaT=2)})
    with pytest.raises(ConfigError, match="'a' and 'b' differ in its schedule"):
        lk.training_processes(model, total_steps=30)


def test_targets_may_differ_in_rank() -> None:
    model, batches = model_and_batches(12)
    lk.attach(
        model, {"a": lk.AdaLoRA(init_r=6, target_r=3), "b": lk.AdaLoRA(init_r=4, target_r=1, alpha=2)}, seed=0
    )
    (process,) = lk.training_processes(model, total_steps=12)
    assert isinstance(process, RankAllocator)
    assert (process.schedule.start, process.schedule.end) == (10, 4)
    train(model, process, batches)
    assert nonzero(model) == 4


# ---- training
@pytest.mark.parametrize("deltaT", [1, 4, 7])
def test_it_ends_at_its_budget_where_peft_does_not(deltaT: int) -> None:
    """PEFT's failing case (2 modules, from 6 to 2, 30 steps) with our defaults."""
    model, batches = model_and_batches(30)
    process = attached(model, lk.AdaLoRA(init_r=6, target_r=2, deltaT=deltaT), 30)
    counts = train(model, process, batches)
    first_final = process.schedule.final_step
    assert counts[first_final:] == [4] * (30 - first_final)
    process.finish()
    assert nonzero(model) == 4 == sum(process.ranks().values())


def test_a_stack_and_a_grouped_convolution_share_the_budget() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
            self.experts = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,nihw->neohw", self.experts, torch.tanh(self.conv(x)))

    torch.manual_seed(0)
    model = Both()
    lk.attach(model, lk.AdaLoRA(init_r=3, target_r=1), ["conv", "experts"], seed=0)
    (process,) = lk.training_processes(model, total_steps=10)
    assert isinstance(process, RankAllocator)
    assert (process.schedule.start, process.schedule.end) == (15, 5)
    optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=1e-2)
    for step in range(10):
        (model(torch.randn(2, 4, 3, 3)).square().mean() + process.penalty()).backward()
        optimizer.step()
        process.after_step(step)
        optimizer.zero_grad()
    assert sum(process.ranks().values()) == 5


def test_it_moves_the_ranks_of_what_is_inside_dora() -> None:
    model, batches = model_and_batches(10)
    process = attached(model, lk.DoRA(lk.AdaLoRA(init_r=6, target_r=2)), 10)
    train(model, process, batches)
    assert nonzero(model) == 4


def test_without_anything_to_prune_the_ranks_stay() -> None:
    """Where PEFT raises: the k-th smallest of nothing."""
    model, batches = model_and_batches(5)
    process = attached(model, lk.AdaLoRA(init_r=3, target_r=3, tfinal=0), 5)
    counts = train(model, process, batches)
    process.finish()
    assert counts[-1] == nonzero(model) == 6


def test_a_training_that_stops_early_ends_at_its_budget() -> None:
    model, batches = model_and_batches(30)
    process = attached(model, lk.AdaLoRA(init_r=6, target_r=2), 30)
    assert train(model, process, batches[:6])[-1] > 4
    process.finish()
    assert nonzero(model) == 4


def test_a_resumed_training_is_the_same_to_the_bit() -> None:
    for stop in (7, 20):
        model, batches = model_and_batches(24)
        method = lk.AdaLoRA(init_r=6, target_r=2, tinit=2, tfinal=8, deltaT=3)
        process = attached(model, method, 24)
        optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=1e-2)
        train(model, process, batches[:stop], optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), process.state_dict()))
        train(model, process, batches[stop:], optimizer, stop)

        again, _ = model_and_batches(0)
        other = attached(again, method, 24)
        optimizer = torch.optim.AdamW(lk.trainable(again).values(), lr=1e-2)
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        other.load_state_dict(saved[2])
        train(again, other, batches[stop:], optimizer, stop)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_the_state_of_another_adapter_is_refused() -> None:
    model, _ = model_and_batches(0)
    state = attached(model, lk.AdaLoRA(init_r=6, target_r=2), 10).state_dict()
    model, _ = model_and_batches(0)
    lk.attach(model, lk.AdaLoRA(init_r=6, target_r=2), ["a"])
    (process,) = lk.training_processes(model, total_steps=10)
    with pytest.raises(TrainingError, match="2 targets there, 1 here"):
        process.load_state_dict(state)


# ---- the penalty
@pytest.mark.parametrize("form", ["norm", "squared"])
def test_both_forms_of_the_penalty(form: str) -> None:
    model, _ = model_and_batches(0)
    method = lk.AdaLoRA(init_r=3, target_r=1, orth_reg_weight=0.3, orth_reg=form)  # type: ignore[arg-type]
    process = attached(model, method, 10)
    sizes = []
    for path in "ab":
        p = getattr(model, path).lorakit.output.default._parameters
        with torch.no_grad():
            p["lora_A"].normal_()
        for gram in (p["lora_A"] @ p["lora_A"].T, p["lora_B"].T @ p["lora_B"]):
            size = ((gram - torch.eye(3)) ** 2).sum()
            sizes.append(size if form == "squared" else size.sqrt())
    got, want = process.penalty(), 0.3 * sum(sizes) / 4
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, want)
    inputs = [p for p in lk.trainable(model).values() if p.shape[-1] != 1]
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_no_weight_is_no_penalty() -> None:
    model, _ = model_and_batches(0)
    assert attached(model, lk.AdaLoRA(init_r=3, target_r=1, orth_reg_weight=0), 10).penalty() == 0


# ---- who survives
def triplets(count: int, r: int) -> list[Triplets]:
    return [
        Triplets(str(i), *(nn.Parameter(torch.ones(size)) for size in ((r, 4), (5, r), (r, 1))))
        for i in range(count)
    ]


def test_equals_are_taken_by_turns() -> None:
    """PEFT masks whatever is at most the threshold: with equal scores, everything."""
    found = triplets(3, 4)
    allocator = RankAllocator(found, BudgetSchedule(12, 5, 10, 0, 5))
    allocator.finish()
    assert allocator.ranks() == {"0": 2, "1": 2, "2": 1}
    assert [int(t.E[0].item()) for t in found] == [1, 1, 1]


@settings(deadline=None, max_examples=60)
@given(scores=st.lists(st.integers(0, 3), min_size=12, max_size=12), budget=st.integers(0, 12))
def test_exactly_the_budget_survives_and_nothing_worth_less_than_what_is_masked(
    scores: list[int], budget: int
) -> None:
    found = triplets(3, 4)
    allocator = RankAllocator(found, BudgetSchedule(12, 5, 10, 0, 5))
    given_scores = torch.tensor(scores, dtype=torch.float32).view(3, 4)
    allocator._scores = lambda: list(given_scores)  # type: ignore[method-assign]
    survives = torch.stack(allocator._best(budget))
    assert int(survives.sum()) == budget
    kept, masked = given_scores[survives], given_scores[~survives]
    assert not len(kept) or not len(masked) or kept.min() >= masked.max()


def test_what_a_triplet_is_worth() -> None:
    """Two steps by hand, in the words of equations 8 to 11."""
    (t,) = triplets(1, 2)
    allocator = RankAllocator([t], BudgetSchedule(2, 1, 10, 0, 5), beta1=0.6, beta2=0.7)
    draw = torch.Generator().manual_seed(0)
    average: list[Any] = [0, 0, 0]
    spread: list[Any] = [0, 0, 0]
    for _ in range(2):
        for i, p in enumerate((t.A, t.B, t.E)):
            p.data.normal_(generator=draw)
            p.grad = torch.randn(p.shape, generator=draw)
            sensitivity = (p * p.grad).abs().detach()
            average[i] = 0.6 * average[i] + 0.4 * sensitivity
            spread[i] = 0.7 * spread[i] + 0.3 * (sensitivity - average[i]).abs()
        with torch.no_grad():
            allocator._observe()
    A, B, E = (a * u for a, u in zip(average, spread, strict=True))
    torch.testing.assert_close(allocator._scores()[0], E[:, 0] + A.mean(1) + B.mean(0))


def test_a_target_that_a_step_did_not_use_is_worth_nothing_in_it() -> None:
    found = triplets(2, 2)
    allocator = RankAllocator(found, BudgetSchedule(4, 2, 10, 0, 5))
    for p in found[1][1:]:
        p.grad = torch.ones_like(p)
    allocator.after_step(0)
    allocator.finish()
    assert allocator.ranks() == {"0": 0, "1": 2}


def test_an_overflow_of_half_precision_does_not_decide_for_ever() -> None:
    found = triplets(2, 2)
    allocator = RankAllocator(found, BudgetSchedule(4, 2, 10, 0, 5))
    for p in found[0][1:]:
        p.grad = torch.full_like(p, float("inf"))
    for p in found[1][1:]:
        p.grad = torch.ones_like(p)
    allocator.after_step(0)
    allocator.finish()
    assert allocator.ranks() == {"0": 0, "1": 2}


def test_averages_of_half_precision_parameters_are_kept_in_full() -> None:
    model, batches = model_and_batches(6)
    process = attached(model, lk.AdaLoRA(init_r=3, target_r=1), 6)
    model.to(torch.bfloat16)
    (process,) = lk.training_processes(model, total_steps=6)  # type: ignore[assignment]
    train(model, process, [(x.bfloat16(), y.bfloat16()) for x, y in batches])
    assert nonzero(model) == 2
    (process,) = lk.training_processes(model, total_steps=6)  # type: ignore[assignment]
    assert {t.dtype for t in process.state_dict()["sensitivity"]} == {torch.float32}
