"""The supported pairs of setting and kind, and what every contract does with one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.attachments import attachments_of
from lorakit.core import Method, Target
from tests import oracles
from tests.contracts.kinds import KINDS, Kind
from tests.contracts.settings import SETTINGS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# For mixes: a partner of another method that can act on the same layer; else the trained copy, which acts everywhere.
PARTNERS = {"lora": "dora", "dora": "rslora", "dora_rslora": "lora", "token_rows": "lora"}


def name_of(kind: Kind, setting: str) -> str:
    """What to write in ``targets`` to adapt this kind with this setting."""
    chosen = SETTINGS[setting]
    if chosen.method.adapts == "layer":
        return kind.names
    return f"{kind.module}.{chosen.parameter or kind.parameter}"


def why_not(kind: Kind, setting: str) -> str | None:
    """The reason that `supports` gives, or None when the pair is supported."""
    model = kind.build()
    method = SETTINGS[setting].method
    name = name_of(kind, setting)
    owner, _, parameter = name.rpartition(".")
    if method.adapts == "parameter" and model.get_submodule(owner)._parameters.get(parameter) is None:
        return f"it has no {parameter}"
    (target,) = lk.find(model, [name], adapts=method.adapts)
    return method.for_path(target.path).supports(target)


def exists(kind: Kind, setting: str) -> bool:
    """Whether the question makes sense: a vector is no matrix, and only what is there can be named."""
    return not (kind.whole and SETTINGS[setting].method.adapts == "layer")


UNSUPPORTED: dict[tuple[str, str], str] = {}
SUPPORTED: list[tuple[str, str]] = []
for _setting in SETTINGS:
    for _kind_name, _kind in KINDS.items():
        if exists(_kind, _setting):
            _reason = why_not(_kind, _setting)
            if _reason is None:
                SUPPORTED.append((_setting, _kind_name))
            else:
                UNSUPPORTED[_setting, _kind_name] = _reason


def pairs(settings: Iterable[str] | None = None, kinds: Iterable[str] | None = None) -> Callable[[Any], Any]:
    """Parametrise over the supported pairs, optionally only those of some settings or kinds."""
    chosen = [
        (s, k) for s, k in SUPPORTED if (settings is None or s in settings) and (kinds is None or k in kinds)
    ]
    assert chosen
    return pytest.mark.parametrize(("setting", "kind"), chosen, ids=[f"{s}-{k}" for s, k in chosen])


class Case:
    """A model of one kind with an input, its stock float64 copy, and adapters with random parameters.

    Attributes:
        model: The model, in the dtype asked for.
        stock: A copy from before anything was attached, float64.
        x: The input, in the dtype asked for.
        draw: A source of random numbers of its own.
    """

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64, *, training: bool = True) -> None:
        self.kind = KINDS[kind]
        self.draw = torch.Generator().manual_seed(7)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = self.kind.build().to(dtype).train(training)
            x = self.kind.inputs()
        self.stock = copy.deepcopy(self.model).double()
        self.x = x.to(dtype) if x.is_floating_point() else x
        self.settings: dict[str, str] = {}

    def attach(self, setting: str, name: str = "a", *, random: bool = True, **options: Any) -> None:
        """Attach an adapter; with ``random``, move its parameters away from where they start."""
        lk.attach(
            self.model, SETTINGS[setting].method, [name_of(self.kind, setting)], name=name, seed=1, **options
        )
        self.settings[name] = setting
        if random:
            randomise(self.parameters(name).values(), self.draw)
            self.clear_ignored(name)

    def attach_partner(self, setting: str, name: str = "b") -> None:
        """A second adapter, of another method."""
        self.attach(PARTNERS.get(setting, "full"), name)

    def clear_ignored(self, name: str) -> None:
        """The column of ``A`` that belongs to ``padding_idx`` starts at zero and gets no gradient, so it stays zero."""
        if self.kind.ignored is not None and "lora_A" in self.parameters(name):
            with torch.no_grad():
                self.parameters(name)["lora_A"][:, self.kind.ignored] = 0

    def target(self, name: str = "a") -> Target:
        """What the adapter adapts."""
        (slot,) = attachments_of(self.model).adapter(name).slots.values()
        return slot.target

    def parameters(self, name: str = "a", model: nn.Module | None = None) -> dict[str, nn.Parameter]:
        """The adapter's live parameters, by their short names."""
        return {
            path.rsplit(".", 1)[-1]: p
            for path, p in (model or self.model).named_parameters()
            if ".lorakit." in path and f".{name}." in path
        }

    def method(self, name: str = "a") -> Method:
        """The adapter's method."""
        return SETTINGS[self.settings[name]].method

    # ---- the reference ------------------------------------------------------------------------------------------
    def values(self, name: str, p: Mapping[str, Tensor]) -> oracles.Values:
        """The stored values that an adapter acts with, says its oracle."""
        parameter = SETTINGS[self.settings[name]].parameter or self.kind.parameter
        method = self.method(name)
        return oracles.ORACLES[method.name](self.stock.get_submodule(self.kind.module), parameter, method, p)

    def expected(
        self,
        weights: Mapping[str, float],
        x: Tensor | None = None,
        p: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Tensor:
        """The float64 output of the stock model under a weighted set of adapters."""
        module = self.stock.get_submodule(self.kind.module)
        changes = []
        for name, weight in weights.items():
            own = {k: v.detach().double() for k, v in self.parameters(name).items()} if p is None else p[name]
            changes.append((weight, self.values(name, own)))
        x = self.x if x is None else x
        values = changes[0][1] if [w for w, _ in changes] == [1.0] else oracles.mixed(module, changes)
        return oracles.output(
            self.stock, self.kind.module, values, x.double() if x.is_floating_point() else x
        )

    def cotangent(self, y: Tensor) -> Tensor:
        """Random weights for a loss; zero where the input is ``padding_idx``, whose gradient torch drops."""
        G = torch.randn(y.shape, generator=self.draw, dtype=torch.float64).to(y.dtype)
        if self.kind.ignored is not None:
            G = G * (self.x != self.kind.ignored).unsqueeze(-1)
        return G


def randomise(parameters: Iterable[Tensor], draw: torch.Generator) -> None:
    """Move parameters by random numbers about as large as they are."""
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a tolerance, absolute and relative to the largest number."""
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)
