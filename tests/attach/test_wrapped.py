"""Models inside other things: torch.compile, data-parallel wrappers, torch.export, torch.jit.trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterNameError, NotAttachedError, TargetError
from tests.attach.small_models import Mlp, fill, names_of, picture, with_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda m: Wrapper(Wrapper(m)), lambda m: torch.compile(m, backend="eager")]
)
def test_every_function_takes_the_wrapper(wrap: Any) -> None:
    model = with_adapters(Mlp(), "a", "b")
    wrapped = wrap(model)
    with lk.use(model, "b"):
        want = model(X)
    with lk.use(wrapped, "b"):
        torch.testing.assert_close(wrapped(X), want)
    lk.set_active(wrapped, "b")
    torch.testing.assert_close(wrapped(X), want)
    assert set(lk.extract(wrapped, "b").tensors) == {"fc1", "fc2"}
    assert len(lk.trainable(wrapped)) == len(lk.trainable(model))
    assert lk.report(wrapped).active == {"b": 1.0}
    lk.merge(wrapped)
    torch.testing.assert_close(wrapped(X), want)
    lk.unmerge(wrapped)
    lk.detach(wrapped)
    assert names_of(model) == []
    with pytest.raises(NotAttachedError):
        lk.report(wrapped)


def test_attaching_more_to_a_wrapper_says_where_the_first_ones_are() -> None:
    wrapped = Wrapper(with_adapters(Mlp(), "a"))
    with pytest.raises(AdapterNameError, match="'module' inside this Wrapper"):
        lk.attach(wrapped, lk.LoRA(r=2), name="b")


def test_attaching_to_a_compiled_model_is_attaching_to_the_model() -> None:
    model = Mlp()
    compiled = torch.compile(model, backend="eager")
    report = lk.attach(compiled, lk.LoRA(r=2), name="a")
    assert [s.path for s in report.sites] == ["fc1", "fc2"]  # and no `_orig_mod` in what is saved
    lk.attach(compiled, lk.LoRA(r=2), name="b")
    assert names_of(model) == ["a", "b"]


def test_attaching_to_a_parallel_wrapper_is_refused() -> None:
    wrapped = nn.DataParallel(Mlp())
    before = picture(wrapped)
    with pytest.raises(TargetError, match="before it is wrapped in DataParallel"):
        lk.attach(wrapped, lk.LoRA(r=2))
    assert picture(wrapped) == before


@pytest.mark.parametrize("method", [lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2))], ids=["lora", "dora"])
def test_a_compiled_model_follows_attach_switch_merge_and_detach(method: Any) -> None:
    """A compiled graph must never go on with the adapter that it was compiled with."""
    torch._dynamo.reset()
    model = Mlp()
    compiled = torch.compile(model, backend="eager")
    base = compiled(X)
    with_adapters(model, "a", "b", method=method)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), model(X))

    assert (compiled(X) - base).abs().max() > 0.01
    for route in ("a", "b", None, {"a": 0.5, "b": 2}, "a"):
        lk.set_active(model, route)
        check()
    for route in ("b", None, "a"):
        with lk.use(model, route):
            check()
    with lk.use(model, rows=["a", "b", None, "a", "b"]):
        check()
    check()
    lk.merge(model, "a")
    check()
    lk.unmerge(model)
    check()
    fill(model, "a", seed=5)
    check()
    lk.detach(model)
    assert torch.equal(compiled(X), base)


def test_a_compiled_model_trains() -> None:
    torch._dynamo.reset()
    model = with_adapters(Mlp(), "a")
    model(X).pow(2).sum().backward()
    want = {n: p.grad.clone() for n, p in lk.trainable(model).items()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(X).pow(2).sum().backward()
    for name, p in lk.trainable(model).items():
        torch.testing.assert_close(p.grad, want[name])


def test_an_adapted_model_can_be_exported_and_traced() -> None:
    model = with_adapters(Mlp(), "a").eval()
    exported = torch.export.export(model, (X,))
    torch.testing.assert_close(exported.module()(X), model(X))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, (X,))(X), model(X))


def test_a_wrapped_model_saves_and_loads_as_the_model_itself(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"encoder": nn.Linear(4, 4), "score": nn.Linear(4, 2)})

    bare = model()
    lk.attach(bare, {"encoder": lk.LoRA(r=2), "score": lk.FullFineTuning()}, name="a", seed=1)
    lk.save(bare, tmp_path / "bare")
    lk.save(Wrapper(bare), tmp_path / "wrapped")
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("bare", "wrapped")]
    assert configs[0] == configs[1]
    assert configs[0]["peft_type"] == "LORA"
    compiled = torch.compile(model(), backend="eager")
    lk.load(compiled, tmp_path / "wrapped", name="b")
    assert set(lk.extract(compiled, "b").spec.methods) == set(lk.extract(bare, "a").spec.methods)
