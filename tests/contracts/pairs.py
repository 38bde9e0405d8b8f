"""The supported pairs of setting and kind, and what every contract does with one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attach.attachments import attachments_of
from lorakit.core import Method, Target, WeightMethod
from lorakit.core.method import InputMethod, KeyValueMethod
from lorakit.targets import DenseStorage, LinearTarget, candidates
from tests import oracles
from tests.contracts.kinds import KINDS, Kind
from tests.contracts.settings import SETTINGS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# For mixes: a partner of another method that can act on the same layer; else the trained copy, which acts everywhere.
PARTNERS = {
    "lora": "dora",
    "dora": "rslora",
    "dora_rslora": "lora",
    "dora_full_gradient": "lora",
    "dora_input": "lora",
    "orthogonal": "pissa",
    "pissa": "dora_pissa",
    "olora": "pissa",
    "dora_pissa": "olora",
    "token_rows": "lora",
    "adalora": "lora_fa",
    "dora_adalora": "adalora",
    "dylora": "dora",
    "lora_fa": "dylora",
    "houlsby": "pfeiffer",
    "pfeiffer": "parallel",
    "parallel": "houlsby",
    "ia3": "dora",
    "ia3_input": "lora",
    "vera": "loha",
    "dora_vera": "vera",
    "loha": "lora",
    "dora_loha": "lokr",
    "lokr": "vera",
    "dora_lokr": "loha",
    "lora_c": "lora",
}


def name_of(kind: Kind, setting: str) -> str:
    """What to write in ``targets`` to adapt this kind with this setting."""
    chosen = SETTINGS[setting]
    if chosen.method.adapts != "parameter":
        return kind.names
    name = f"{kind.module}.{chosen.parameter or kind.parameter}"
    return f"{name}[{kind.part}]" if kind.part else name


def why_not(kind: Kind, setting: str) -> str | None:
    """The reason that `supports` gives, or None when the pair is supported."""
    model = kind.build()
    method = SETTINGS[setting].method
    name = name_of(kind, setting)
    owner, _, parameter = name.partition("[")[0].rpartition(".")
    if method.adapts == "parameter" and kind.lossy and parameter == kind.parameter:
        return f"its {parameter} is quantised, and codes cannot be trained"
    if method.adapts == "parameter" and model.get_submodule(owner)._parameters.get(parameter) is None:
        return f"it has no {parameter}"
    try:
        (target,) = lk.find(model, [name], adapts=method.adapts)
    except lk.LorakitError as error:
        return str(error).partition("cannot be adapted: ")[2].removesuffix(".") or str(error)
    return method.for_path(target.path).supports(target)


def exists(kind: Kind, setting: str) -> bool:
    """Whether the question makes sense: a vector is no matrix, an attention is no layer."""
    adapts = SETTINGS[setting].method.adapts
    if adapts == "module" and kind.adapts == "layer":
        return not kind.whole and kind.names.partition("[")[0] == kind.module
    if kind.adapts != "layer" or adapts not in ("layer", "parameter"):
        return adapts == kind.adapts
    return not (kind.whole and adapts == "layer")


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


def pairs(
    settings: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    *,
    of: type[Method] = Method,
    fresh: bool = False,
) -> Callable[[Any], Any]:
    """Parametrise over the supported pairs.

    Args:
        settings: Only these.
        kinds: Only these.
        of: Only methods of this tier: what defines no weight cannot be merged, or weighed.
        fresh: Only methods that start from the base model's output.
    """
    chosen = [
        (s, k)
        for s, k in SUPPORTED
        if (settings is None or s in settings)
        and (kinds is None or k in kinds)
        and isinstance(SETTINGS[s].method, of)
        and (SETTINGS[s].method.starts_at_base or not fresh)
    ]
    assert chosen
    return pytest.mark.parametrize(("setting", "kind"), chosen, ids=[f"{s}-{k}" for s, k in chosen])


def askable(route: Any, setting: str) -> Any:
    """A weighted mix as both adapters whole, for a method of what stands in front of the tokens: that has no half."""
    in_front = isinstance(SETTINGS[setting].method, (KeyValueMethod, InputMethod))
    return {"a": 1, "b": 1} if in_front and isinstance(route, Mapping) else route


class Case:
    """A model of one kind with an input, its stock float64 copy, and adapters with random parameters.

    Attributes:
        model: The model, in the dtype asked for.
        untouched: A copy from before anything was attached.
        stock: The same as a dense float64 model: of a quantised layer it holds the values that the codes stand for.
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
        self.untouched = copy.deepcopy(self.model)
        self.stock = dense(self.untouched)
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
        partner = PARTNERS.get(setting, "full")
        supported = self.kind.adapts != "layer" or (
            exists(self.kind, partner) and why_not(self.kind, partner) is None
        )
        self.attach(partner if supported else "lora", name)

    def clear_ignored(self, name: str) -> None:
        """The column of ``A`` that belongs to ``padding_idx`` starts at zero and gets no gradient, so it stays zero."""
        if self.kind.ignored is None:
            return
        for key, p in self.parameters(name).items():
            if key in ("lora_A", "start_A"):
                with torch.no_grad():
                    p[:, self.kind.ignored] = 0

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

    def trained(self, name: str = "a") -> dict[str, nn.Parameter]:
        """Those of them that are trained."""
        return {key: p for key, p in self.parameters(name).items() if p.requires_grad}

    def method(self, name: str = "a") -> Method:
        """The adapter's method."""
        return SETTINGS[self.settings[name]].method

    def mergeable(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Those of some adapters that define a weight, which can be merged."""
        return {name: w for name, w in weights.items() if isinstance(self.method(name), WeightMethod)}

    # ---- the reference ------------------------------------------------------------------------------------------
    def values(self, name: str, p: Mapping[str, Tensor]) -> oracles.Values:
        """The stored values that an adapter acts with, says its oracle."""
        parameter = SETTINGS[self.settings[name]].parameter or self.kind.parameter
        method = self.method(name)
        module, oracle = self.stock.get_submodule(self.kind.module), oracles.ORACLES[method.name]
        if self.kind.of:
            return oracles.in_rows(self.kind.of, oracle, module, parameter, method, p)
        return oracle(module, parameter, method, p)

    def expected(
        self,
        weights: Mapping[str, float],
        x: Tensor | None = None,
        p: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Tensor:
        """The float64 output of the stock model under a weighted set of adapters."""
        x = self.x if x is None else x
        if any(self.method(name).name in oracles.LAYER_OUTPUTS for name in weights):
            return self._output_of_layer(weights, x, p)
        if not self.mergeable(weights):
            return self._output_alone(weights, x, p)
        return self._output(self._changed(weights, p), x)

    def merged(self, weights: Mapping[str, float]) -> Tensor:
        """The same for the model with these adapters merged: the new weight is rounded to what the layer can store."""
        values = self._changed(weights, None)
        if self.kind.lossy and self.kind.parameter in values:
            holder = copy.deepcopy(self.untouched)
            (target,) = lk.find(holder, [self.kind.names.partition("[")[0]])
            target.storage.store(
                target.module, target.parameter, values[self.kind.parameter].to(target.stored.dtype)
            )
            values[self.kind.parameter] = target.storage.load(target.module, target.parameter).double()
        return self._output(values, self.x)

    def _changed(
        self, weights: Mapping[str, float], p: Mapping[str, Mapping[str, Tensor]] | None
    ) -> oracles.Values:
        """What the adapted module would have to store, by name."""
        changes = []
        for name, weight in weights.items():
            own = {k: v.detach().double() for k, v in self.parameters(name).items()} if p is None else p[name]
            changes.append((weight, self.values(name, own)))
        if [w for w, _ in changes] == [1.0]:
            return changes[0][1]
        return oracles.mixed(self.stock.get_submodule(self.kind.module), changes)

    def _output(self, values: oracles.Values, x: Tensor) -> Tensor:
        x = x.double() if x.is_floating_point() else x
        return oracles.output(self.stock, self.kind.module, values, x)

    def _output_of_layer(
        self, weights: Mapping[str, float], x: Tensor, p: Mapping[str, Mapping[str, Tensor]] | None
    ) -> Tensor:
        """The same where an adapter changes what a layer puts out: ``y + sum_i w_i (y_i - y)``."""
        kind = self.kind

        def output_of(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            own = {k: v.detach().double() for k, v in self.parameters(name).items()} if p is None else p[name]
            method = self.method(name)
            if method.name not in oracles.LAYER_OUTPUTS:
                module._forward_hooks.clear()
                return oracles.output(module, "", self.values(name, own), x)
            oracle = oracles.LAYER_OUTPUTS[method.name]
            if not kind.of:
                return oracle(method, own, x, y)
            rows = torch.tensor(kind.of)
            return y.index_copy(-1, rows, oracle(method, own, x, y.index_select(-1, rows)))

        def change(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return y + sum(w * (output_of(name, module, x, y) - y) for name, w in weights.items())

        x = x.double() if x.is_floating_point() else x
        return oracles.changed_output(self.stock, kind.entry or kind.module, kind.module, change, x)

    def _output_alone(
        self, weights: Mapping[str, float], x: Tensor, p: Mapping[str, Mapping[str, Tensor]] | None
    ) -> Tensor:
        """The same for one adapter that changes no weight."""
        ((name, weight),) = weights.items()
        assert weight == 1
        own = {k: v.detach().double() for k, v in self.parameters(name).items()} if p is None else p[name]
        oracle = oracles.OUTPUTS[self.method(name).name]
        return oracle(self.stock, self.kind.module, self.method(name), own, x)

    def cotangent(self, y: Tensor) -> Tensor:
        """Random weights for a loss; zero where the input is ``padding_idx``, whose gradient torch drops."""
        G = torch.randn(y.shape, generator=self.draw, dtype=torch.float64).to(y.dtype)
        if self.kind.ignored is not None:
            G = G * (self.x != self.kind.ignored).unsqueeze(-1)
        return G


def dense(model: nn.Module) -> nn.Module:
    """A copy in float64 with every weight dense."""
    copied = copy.deepcopy(model)
    for path, target in candidates(copied).items():
        if isinstance(target, LinearTarget) and not isinstance(target.storage, DenseStorage):
            layer = target.module
            stock = (
                Conv1D(target.out, target.in_)
                if isinstance(layer, Conv1D)
                else nn.Linear(target.in_, target.out)
            )
            stock._parameters["weight"] = nn.Parameter(target.storage.load(layer, "weight").clone())
            stock._parameters["bias"] = target.bias  # type: ignore[assignment]
            parent, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent), name, stock.train(layer.training))
    return copied.double()


def randomise(parameters: Iterable[Tensor], draw: torch.Generator) -> None:
    """Move parameters by random numbers about as large as they are."""
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))


precision = 0.0
"""What the layer under test computes to itself, see `tests.contracts.conftest`."""


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a tolerance, absolute and relative to the largest number."""
    tolerance = max(tolerance, precision)
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)
