"""DyLoRA: any rank of it is a plain LoRA, and a step trains what its rank says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, UnsupportedTargetError
from lorakit.methods.dylora import ACTIVE, TRAINED, RankDraw
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, pairs, randomise


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def random_model(method: lk.DyLoRA | lk.DoRA, r: int = 4) -> tuple[Two, RankDraw, Tensor]:
    """Two layers with a random adapter, its process, and an input."""
    torch.manual_seed(0)
    model = Two().double()
    lk.attach(model, method, ["a", "b"], seed=0)
    draw = torch.Generator().manual_seed(1)
    randomise(lk.trainable(model).values(), draw)
    (process,) = lk.training_processes(model, total_steps=100)
    assert isinstance(process, RankDraw)
    return model, process, torch.randn(5, 6, dtype=torch.float64)


def own(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    return getattr(model, path).lorakit.output.default._parameters


@pytest.mark.parametrize("frozen_below", [True, False], ids=["frozen", "unfrozen"])
def test_a_step_of_rank_b_computes_the_plain_lora_of_the_slices(frozen_below: bool) -> None:
    model, process, x = random_model(lk.DyLoRA(r=4, alpha=3, frozen_below=frozen_below))
    seen = set()
    for step in range(30):
        process.before_forward(step)
        b = process.rank
        seen.add(b)
        expected = x
        for path in "ab":
            layer, p = getattr(model, path), own(model, path)
            W = layer.weight + 3 / b * p["lora_B"][:, :b] @ p["lora_A"][:b]
            expected = expected @ W.T + layer.bias
            expected = torch.tanh(expected) if path == "a" else expected
        close(model(x), expected, 1e-14)
        process.after_step(step)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("frozen_below", [True, False], ids=["frozen", "unfrozen"])
def test_gradients_reach_the_directions_that_the_step_trains(frozen_below: bool) -> None:
    model, process, x = random_model(lk.DyLoRA(r=4, alpha=3, frozen_below=frozen_below))
    for step in range(12):
        process.before_forward(step)
        model.zero_grad()
        model(x).square().sum().backward()
        b = process.rank
        trained = {b - 1} if frozen_below else set(range(b))
        for path in "ab":
            p = own(model, path)
            assert {i for i in range(4) if p["lora_A"].grad[i].any()} == trained
            assert {i for i in range(4) if p["lora_B"].grad[:, i].any()} == trained
        process.after_step(step)


def test_between_steps_and_without_a_process_the_whole_adapter_acts() -> None:
    """In the authors' code a model that nobody sets a rank on evaluates at rank 1."""
    model, process, x = random_model(lk.DyLoRA(r=4, alpha=3))
    plain = Two().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    lk.attach(plain, lk.LoRA(r=4, alpha=3), ["a", "b"])
    with torch.no_grad():
        for path in "ab":
            for name in ("lora_A", "lora_B"):
                own(plain, path)[name].copy_(own(model, path)[name])
    y = model(x)
    close(y, plain(x), 1e-14)
    process.before_forward(0)
    assert not torch.allclose(model(x), y)
    process.after_step(0)
    assert torch.equal(model(x), y)
    process.before_forward(1)
    process.finish()
    assert torch.equal(model(x), y)


def test_without_a_process_everything_is_trained() -> None:
    model, _, x = random_model(lk.DyLoRA(r=4))
    model(x).square().sum().backward()
    assert all(own(model, "a")["lora_A"].grad.abs().sum(1) > 0)


def test_the_draws_are_uniform_and_the_same_for_the_same_seed() -> None:
    draws = []
    for seed in (0, 0, 1):
        process = random_model(lk.DyLoRA(r=4, seed=seed))[1]
        ranks = []
        for step in range(400):
            process.before_forward(step)
            ranks.append(process.rank)
        draws.append(ranks)
    assert draws[0] == draws[1] != draws[2]
    assert all(70 < draws[0].count(b) < 130 for b in (1, 2, 3, 4))


def test_the_draws_leave_the_global_generator_alone() -> None:
    _, process, _ = random_model(lk.DyLoRA(r=4))
    before = torch.get_rng_state()
    process.before_forward(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_training_draws_on() -> None:
    _, process, _ = random_model(lk.DyLoRA(r=5))
    for step in range(5):
        process.before_forward(step)
    state = copy.deepcopy(process.state_dict())
    _, other, _ = random_model(lk.DyLoRA(r=5))
    other.load_state_dict(state)
    for step in range(5, 25):
        process.before_forward(step)
        other.before_forward(step)
        assert process.rank == other.rank


def test_all_targets_share_what_says_which_directions_act() -> None:
    model, _, _ = random_model(lk.DyLoRA(r=4))
    assert own(model, "a")[ACTIVE] is own(model, "b")[ACTIVE]
    assert own(model, "a")[TRAINED] is own(model, "b")[TRAINED]
    state = lk.extract(model)
    assert {name: t.tolist() for name, t in state.shared.items()} == {ACTIVE: [1] * 4, TRAINED: [1] * 4}
    assert {n.rsplit(".", 1)[-1] for n in lk.trainable(model)} == {"lora_A", "lora_B"}


@pairs(settings=("dylora",))
def test_a_rank_of_every_kind_of_layer(setting: str, kind: str) -> None:
    """Rank 1 of 2 equals the formula with that mask, which the contract tests compare with the dense one."""
    case = Case(kind)
    case.attach(setting)
    p = case.parameters("a")
    with torch.no_grad():
        p[ACTIVE].copy_(torch.tensor([1.0, 0.0]))
    close(case.model(case.x), case.expected({"a": 1.0}), max(1e-12, case.kind.precision))
    cut = {**p, "lora_A": p["lora_A"][..., :1, :], "lora_B": p["lora_B"][..., :1]}
    target = case.target()
    plain = lk.LoRA(r=1, alpha=3)
    change = case.method("a").delta(target, p)  # type: ignore[attr-defined]
    close(change, plain.delta(target, cut), 1e-6 if case.kind.precision else 1e-14)


def test_for_other_programs_it_is_a_lora_of_the_highest_rank() -> None:
    model, _, x = random_model(lk.DoRA(lk.DyLoRA(r=4, alpha=3, dropout=0.1)))
    y = model.eval()(x)
    state = lk.extract(model).plain()
    assert set(state.spec.methods.values()) == {lk.DoRA(lk.LoRA(r=4, alpha=3, dropout=0.1))}
    assert not state.shared
    lk.detach(model)
    lk.attach(model, state)
    close(model(x), y, 1e-14)


def test_it_learns_at_every_rank() -> None:
    """A rank-4 map is fitted; the error falls with the rank that is left."""
    torch.manual_seed(0)
    goal = torch.randn(10, 4) @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ torch.randn(4, 10)
    model = Host(nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model.layer.weight.zero_()
    lk.attach(model, lk.DyLoRA(r=4, alpha=4, frozen_below=False), ["layer"], seed=0)
    (process,) = lk.training_processes(model, total_steps=1500)
    optimizer = torch.optim.Adam(lk.trainable(model).values(), lr=1e-2)
    for step in range(1500):
        process.before_forward(step)
        x = torch.randn(32, 10)
        (model(x) - x @ goal.T).square().mean().backward()
        optimizer.step()
        process.after_step(step)
        optimizer.zero_grad()
    process.finish()
    from lorakit.adapters import truncate

    errors = []
    for r in (1, 2, 3, 4):
        fresh = Host(nn.Linear(10, 10, bias=False))
        with torch.no_grad():
            fresh.layer.weight.zero_()
        lk.attach(fresh, truncate(lk.extract(model), r))
        x = torch.eye(10)
        errors.append(float((fresh(x) - x @ goal.T).norm() / goal.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8
    assert errors[-1] < 0.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"seed": 0.5}, "seed"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.DyLoRA(**settings)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="r=5 is more than a 4 x 4"):
        lk.attach(Host(nn.Linear(4, 4)), lk.DyLoRA(r=5), ["layer"])
    with pytest.raises(UnsupportedTargetError, match="no input to drop"):
        lk.attach(nn.MultiheadAttention(4, 2), lk.DyLoRA(r=2, dropout=0.1), ["out_proj"])
    with pytest.raises(ConfigError, match="two adapters"):
        lk.attach(Two(), {"a": lk.DyLoRA(r=2), "b": lk.DyLoRA(r=3)})


def test_dropout_acts_in_training() -> None:
    case = Case("linear")
    lk.attach(case.model, lk.DyLoRA(r=2, dropout=0.5), ["layer"], name="a")
    randomise([case.parameters("a")["lora_B"]], case.draw)
    assert not torch.equal(case.model(case.x), case.model(case.x))
    case.model.eval()
    assert torch.equal(case.model(case.x), case.model(case.x))
