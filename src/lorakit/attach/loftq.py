"""LoftQ on a model: quantise the base and attach the adapter that makes up for what that loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.attach.attach import attach, check_name
from lorakit.attach.planning import Plan, check_starts, plan_method
from lorakit.attach.quantize import (
    QuantizeReport,
    check_no_adapters,
    quantizable,
    quantize_targets,
    storage_named,
)
from lorakit.attach.report import AttachReport
from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.selection import Selector
from lorakit.core.target import Target
from lorakit.core.walk import uncompiled
from lorakit.errors import ConfigError
from lorakit.methods.dora import DoRA
from lorakit.methods.init.loftq import First, LoftQ
from lorakit.methods.init.loftq import loftq as decomposition_of
from lorakit.methods.lora import LoRA
from lorakit.ops import Packed
from lorakit.ops.truncated_svd import leading_triplets, leading_triplets_by_projection
from lorakit.targets.recognise import layer_target

Decomposition = Literal["exact", "projection"]


@dataclass(frozen=True)
class LoftQReport:
    """What `loftq` did; print it.

    Attributes:
        quantized: What was quantised.
        attached: What was attached.
        errors: Path to ``||W - Q - s B A|| / ||W||`` after each turn; the least of them is what the model has.
        plain_errors: Path to ``||W - q(W)|| / ||W||``: what quantising alone would have lost.
    """

    quantized: QuantizeReport
    attached: AttachReport
    errors: Mapping[str, tuple[float, ...]]
    plain_errors: Mapping[str, float]

    def __str__(self) -> str:
        kept = [min(errors) for errors in self.errors.values()]
        plain = list(self.plain_errors.values())
        return (
            f"{self.quantized}\n{self.attached}\nError of the weights: {sum(kept) / len(kept):.4f} on average (at most "
            f"{max(kept):.4f}) of their norm; {sum(plain) / len(plain):.4f} without the adapter."
        )


def loftq(
    model: nn.Module,
    method: Method,
    storage: str = "nf4",
    targets: Selector = "all-linear",
    *,
    exclude: Selector | None = None,
    iterations: int = 5,
    first: First = "quantize",
    name: str = "default",
    block: int = 64,
    double_quant: bool = True,
    decomposition: Decomposition = "exact",
    seed: int = 0,
) -> LoftQReport:
    """Quantise linear layers and attach an adapter that starts where both together are nearest to the old weights.

    As `lorakit.quantize` and `lorakit.attach` in one; everything is checked before anything is touched. The factors are
    divided by the root of the scale each, so that the model starts at ``Q + s B A`` with the error that is reported
    (the published code leaves the scale out, and starts elsewhere unless alpha = r).

    The adapter belongs to this quantised base, not to the dense one: save both, or run `loftq` with the same settings
    on the same weights before loading the adapter.

    Args:
        model: A dense model without adapters.
        method: ``LoRA(...)`` or ``DoRA(LoRA(...))``, with any scaling and patterns.
        storage: ``"nf4"`` or ``"int8"``, see `lorakit.quantize`.
        targets: Which layers to quantise and adapt.
        exclude: What to leave out of ``targets``.
        iterations: Turns of quantising and decomposing; the best is kept.
        first: ``"quantize"`` for LoftQ; ``"svd"`` for QPiSSA, whose adapter starts at the principal triplets and whose
            base is the quantised rest.
        name: The adapter's name.
        block: Numbers that share a scale, for ``"nf4"``.
        double_quant: Keep the scales of ``"nf4"`` in eight bits.
        decomposition: ``"exact"`` singular values, or by random ``"projection"``: much faster on large weights, nearly
            as good.
        seed: Of the random projection.

    Raises:
        TargetError: Nothing matches, or what is named cannot be quantised or adapted.
        MergeError: The model carries adapters.
        AdapterNameError: The name is not allowed.
        ConfigError: A setting makes no sense.
    """
    model = uncompiled(model)
    form = storage_named(storage, block, double_quant)
    check_no_adapters(model, "loftq")
    check_name(name, None)
    _check_method(method)
    chosen, skipped = quantizable(model, targets, exclude)
    places = [target.path for target in chosen]
    plan = plan_method(model, method, places, None)
    if decomposition not in ("exact", "projection"):
        raise ConfigError(f"decomposition is 'exact' or 'projection'; got {decomposition!r}.")
    check_starts(plan)
    generator = torch.Generator().manual_seed(seed)
    by_projection = partial(leading_triplets_by_projection, iterations=4, generator=generator)
    found: dict[str, LoftQ] = {}
    plain_errors: dict[str, float] = {}
    for path, (target, resolved) in plan.items():
        W = target.weight().float()
        inner = _inner(resolved)
        found[path] = decomposition_of(
            W,
            inner.r,
            form.encode,
            iterations=iterations,
            first=first,
            decompose=leading_triplets if decomposition == "exact" else by_projection,
        )
        error = W - form.encode(W).dequantize()
        plain_errors[path] = float(error.norm()) / (float(W.norm()) or 1.0)
    # Nothing has been touched so far.
    packed: dict[str, Packed] = {path: result.packed for path, result in found.items()}
    quantized = quantize_targets(model, [target for target, _ in plan.values()], form, skipped, packed)
    state = _state(
        model, plan, found, {"loftq": {"storage": str(form), "iterations": iterations, "first": first}}
    )
    attached = attach(model, state, name=name, trainable=True)
    return LoftQReport(quantized, attached, {p: result.errors for p, result in found.items()}, plain_errors)


def _state(
    model: nn.Module, plan: Plan, found: Mapping[str, LoftQ], info: Mapping[str, object]
) -> AdapterState:
    """The adapter whose changes make up for the errors, on the layers as they are quantised now."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, (_, method) in plan.items():
        target = layer_target(model, path)
        assert isinstance(target, Target)
        root = math.sqrt(abs(_inner(method).scale))
        own = method.start(target, torch.Generator().manual_seed(0), {})
        own |= {
            "lora_A": found[path].A / root,
            "lora_B": found[path].B / math.copysign(root, _inner(method).scale),
        }
        if isinstance(method, DoRA):
            own["magnitude"] = method.norms(target, own, target.weight()).to(own["magnitude"])
        tensors[path] = own
    shapes = {path: target.shape for path, (target, _) in plan.items()}
    spec = AdapterSpec({path: method for path, (_, method) in plan.items()}, shapes, base, info)
    return AdapterState(spec, tensors)


def _inner(method: Method) -> LoRA:
    inner = method.inner if isinstance(method, DoRA) else method
    assert isinstance(inner, LoRA)
    return inner


def _check_method(method: Method) -> None:
    inner = method.inner if isinstance(method, DoRA) else method
    if type(inner) is not LoRA:
        raise ConfigError(
            f"loftq starts the two factors of a LoRA, or of a DoRA over one; got {type(method).__name__}."
        )
    if inner.init not in ("kaiming", "gaussian"):
        raise ConfigError(
            f"loftq makes the start itself, so init={inner.init!r} has no meaning here. For the principal triplets "
            "with a quantised rest (QPiSSA), pass first='svd'."
        )
    if not inner.scale:
        raise ConfigError("alpha=0 leaves nothing of what loftq starts with.")
