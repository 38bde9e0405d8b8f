"""LoftQ on a model: the base is quantised, the adapter makes up for it, and their scale is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from tests.attach.small_models import bits, picture


class Model(nn.Module):
    """Three layers of two classes, and a norm that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 64)
        self.norm = nn.LayerNorm(64)
        self.mix = Conv1D(32, 64)
        self.down = nn.Linear(32, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.mix(self.norm(self.up(x)))))


def made(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def vectors(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {target.path: target.weight().clone() for target in lk.find(model)}


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Base plus adapter at each target."""
    state = lk.extract(model)
    found = {}
    for target in lk.find(model):
        method = state.spec.methods[target.path]
        found[target.path] = method.weight(target, state.tensors[target.path], target.weight())  # type: ignore[attr-defined]
    return found


METHODS = {
    "lora": lk.LoRA(r=8, alpha=8),
    "alpha-2": lk.LoRA(r=8, alpha=16),
    "alpha-negative": lk.LoRA(r=8, alpha=-4),
    "rslora": lk.LoRA(r=8, alpha=16, scaling="rslora"),
    "pattern": lk.LoRA(r=4, rank_pattern={"down": 12}),
    "dora": lk.DoRA(lk.LoRA(r=8)),
}


@pytest.mark.parametrize("first", ["quantize", "svd"])
@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("name", METHODS)
def test_the_model_starts_nearest_to_the_old_weights(name: str, storage: str, first: str) -> None:
    model = made()
    old, y = matrices(model), model(vectors())
    report = lk.loftq(model, METHODS[name], storage, first=first)  # type: ignore[arg-type]
    new, base = effective(model), matrices(model)
    assert report.errors.keys() == old.keys() == {"up", "mix", "down"}
    for path, W in old.items():
        error = float((new[path] - W).norm() / W.norm())
        assert error == pytest.approx(min(report.errors[path]), rel=1e-4)
        assert error < report.plain_errors[path]
        assert not torch.equal(base[path], W)
    assert {site.method for site in report.attached.sites} == {"dora" if name == "dora" else "lora"}
    assert report.attached.trainable == report.attached.parameters
    plain = made()
    lk.quantize(plain, storage)
    assert (model(vectors()) - y).norm() < (plain(vectors()) - y).norm()
    assert "of their norm" in str(report)


def test_the_rank_of_a_pattern_is_that_of_its_target() -> None:
    model = made()
    lk.loftq(model, METHODS["pattern"])
    state = lk.extract(model)
    assert {p: t["lora_A"].shape[0] for p, t in state.tensors.items()} == {"up": 4, "mix": 4, "down": 12}


def test_the_same_call_gives_the_same_model() -> None:
    one, other = made(), made()
    lk.loftq(one, METHODS["lora"])
    state = torch.get_rng_state()
    lk.loftq(other, METHODS["lora"])
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert {k: bits(v) for k, v in one.state_dict().items()} == {
        k: bits(v) for k, v in other.state_dict().items()
    }


def test_it_trains_saves_and_comes_back(tmp_path: Any) -> None:
    model = made(torch.float32)
    lk.loftq(model, METHODS["alpha-2"], name="q")
    optimizer = torch.optim.SGD(lk.trainable(model).values(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = (model(vectors(torch.float32)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    y = model(vectors(torch.float32))
    lk.save(model, tmp_path / "adapter", name="q")
    lk.detach(model)
    again = made(torch.float32)  # the same weights and settings: the same quantised base
    lk.loftq(again, METHODS["alpha-2"])
    lk.detach(again)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    lk.load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(vectors(torch.float32)), y)


def test_a_projection_is_nearly_as_good() -> None:
    exact = lk.loftq(made(), METHODS["lora"])
    fast = lk.loftq(made(), METHODS["lora"], decomposition="projection")
    for path, errors in exact.errors.items():
        assert min(fast.errors[path]) < 1.02 * min(errors)


def test_bfloat16() -> None:
    model = made(torch.bfloat16)
    y = model(vectors(torch.bfloat16))
    lk.loftq(model, METHODS["lora"])
    assert {p.dtype for p in lk.trainable(model).values()} == {torch.float32}
    assert (model(vectors(torch.bfloat16)) - y).norm() / y.norm() < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lk.LoRA(r=8, init="pissa"),), "first='svd'"),
        ((lk.LoRA(alpha=0.0),), "alpha=0"),
        ((lk.FullFineTuning(),), "FullFineTuning"),
        ((lk.LoRA(r=21),), "'down'"),
        ((lk.LoRA(rank_pattern={"nowhere": 2}),), "nowhere"),
        ((lk.LoRA(), "nf5"), "'nf4'"),
        ((lk.LoRA(), "nf4", ["dwon"]), "down"),
        ((lk.LoRA(), "nf4", ["norm"]), "norm"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_and_touches_nothing(arguments: tuple[Any, ...], message: str) -> None:
    model = made()
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=message):
        lk.loftq(model, *arguments)
    for options in ({"iterations": 0}, {"first": "x"}, {"name": "a.b"}, {"decomposition": "x"}, {"block": 3}):
        with pytest.raises(lk.LorakitError):
            lk.loftq(model, lk.LoRA(), **options)  # type: ignore[arg-type]
    assert picture(model) == before


def test_a_model_with_adapters_is_refused() -> None:
    model = made()
    lk.attach(model, lk.LoRA(), ["up"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lk.LorakitError, match="before attaching"):
        lk.loftq(model, lk.LoRA(), targets=["down"], name="other")
    assert list(before) == list(model.state_dict())
