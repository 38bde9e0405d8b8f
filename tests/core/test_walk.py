"""The walk past the adapters sees what torch's own walk sees on a bare model, and the same after attaching."""

from __future__ import annotations

import pytest
from torch import nn

import lorakit as lk
from lorakit.core.walk import base_modules, base_parameters, module_at


class Tied(nn.Module):
    """A shared module, a tied parameter, an empty place and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
        self.again = self.first[1]
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.none = None
        self.gain = nn.Parameter(self.first[0].weight.new_ones(3))
        self.register_module("empty", None)


@pytest.mark.parametrize("make", [Tied, lambda: nn.Linear(2, 2), lambda: nn.TransformerEncoderLayer(4, 2)])
def test_it_sees_what_torch_sees(make: type[nn.Module]) -> None:
    model = make()
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    assert list(base_modules(model)) == modules
    assert [path for path, _ in base_parameters(model)] == [path for path, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(base_parameters(model), parameters, strict=True))
    if isinstance(model, Tied):
        for name in "ab":
            lk.attach(model, lk.LoRA(r=1), targets=["0", "head"], name=name)
        lk.attach(model, lk.FullFineTuning(), targets=["gain"], name="c")
        assert [path for path, _ in base_modules(model)] == [path for path, _ in modules]
        assert [path for path, _ in base_parameters(model)] == [path for path, _ in parameters]
        assert len(list(model.named_modules())) > len(modules)


class Wrapper(nn.Module):
    """Answers for what it wraps, as a compiled module does."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> object:
        return self._modules[name] if name in self._modules else getattr(self._modules["inside"], name)


def test_a_path_leads_where_get_submodule_leads() -> None:
    model = Tied()
    for path, module in model.named_modules():
        assert module_at(model, path) is module
        assert module_at(Wrapper(model), path) is Wrapper(model).get_submodule(path) or path == ""
    for path in ("nothing", "first.9", "first.0.weight", "empty", "gain"):
        with pytest.raises(AttributeError):
            module_at(model, path)
