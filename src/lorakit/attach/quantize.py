"""Quantising the base of a model, and back: what QLoRA trains its adapters on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.attach.report import table_of
from lorakit.core.selection import PRESETS, Selector
from lorakit.core.target import Target
from lorakit.core.walk import HOME, base_modules, uncompiled
from lorakit.errors import ConfigError, MergeError, UnsupportedTargetError, listing, near_matches
from lorakit.ops import Packed, all_finite
from lorakit.targets.counting import base_bytes
from lorakit.targets.dense import DenseStorage
from lorakit.targets.find import find
from lorakit.targets.quantized import (
    Int8Storage,
    NF4Storage,
    QuantizedStorage,
    dequantize_layer,
    keep_packed,
    quantized_storage,
)

STORAGES = ("nf4", "int8")


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer that was quantised.

    Attributes:
        path: Where.
        size: Size of its weight, as text.
        storage: The form, as text.
        parameters: Numbers in its weight.
        bytes_before: Of the dense weight.
        bytes_after: Of the codes and scales.
    """

    path: str
    size: str
    storage: str
    parameters: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did; print it.

    Attributes:
        layers: The layers that are quantised now.
        skipped: Paths that the choice named in passing and that stay dense, with the reason.
        model_bytes_before: Of all weights and buffers of the model.
        model_bytes_after: The same afterwards.
    """

    layers: tuple[QuantizedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def parameters(self) -> int:
        """Numbers in the quantised weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Of the dense weights."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of the codes and scales."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_parameter(self) -> float:
        """Bits that a number of the quantised weights takes, scales included."""
        return 8 * self.bytes_after / max(1, self.parameters)

    def __str__(self) -> str:
        lines = [
            f"Quantised {len(self.layers)} layers, {self.parameters:,} parameters: {_mb(self.bytes_before)} to "
            f"{_mb(self.bytes_after)}, {self.bits_per_parameter:.3f} bits each. The model: "
            f"{_mb(self.model_bytes_before)} to {_mb(self.model_bytes_after)}.",
        ]
        groups: dict[tuple[str, ...], list[QuantizedLayer]] = {}
        for layer in self.layers:
            groups.setdefault((layer.path.rsplit(".", 1)[-1], layer.size, layer.storage), []).append(layer)
        lines += table_of(
            [
                (f"{len(same)} x", *key, _mb(sum(layer.bytes_after for layer in same)))
                for key, same in groups.items()
            ]
        )
        lines += [f"  left dense: {path} ({reason})" for path, reason in self.skipped]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    storage: str = "nf4",
    targets: Selector = "all-linear",
    *,
    exclude: Selector | None = None,
    block: int = 64,
    double_quant: bool = True,
) -> QuantizeReport:
    """Keep the weights of linear layers in four or eight bits. Everything is checked before anything is touched.

    This is the base of QLoRA: adapters that are attached afterwards train on it as on any other, while its weights take
    an eighth of the memory of float32. The values that the model computes with change (by about 9 % of the norm of each
    weight for ``"nf4"``, under 1 % for ``"int8"``) and the old ones are gone: `dequantize` gives dense weights back,
    not the old values. Modules, names, biases and hooks stay; ``weight`` of a layer becomes ``weight_codes``,
    ``weight_absmax`` ... in the state dict, and reading ``layer.weight`` gives the dense values.

    Merging works as on a dense model, but what is stored is quantised again, with an error of the same size as at
    first; unmerging puts the codes and scales back bit for bit. To merge without that error, `extract` the adapter,
    `detach` it, `dequantize`, attach it again and merge.

    Args:
        model: A model without adapters, on any device.
        storage: ``"nf4"``, four bits on levels for normally distributed weights (arXiv 2305.14314), or ``"int8"``,
            eight bits with a scale for each output feature.
        targets: Which layers, see `lorakit.find`; by default all linear layers but the head. Of a preset, layers that
            cannot be quantised are left dense and reported; one that is named is an error.
        exclude: What to leave out of ``targets``.
        block: For ``"nf4"``: how many numbers share a scale, 32, 64, ... 4096.
        double_quant: For ``"nf4"``: keep the scales in eight bits (4.127 bits a number instead of 4.5).

    Raises:
        TargetError: Nothing matches, or what is named cannot be quantised.
        MergeError: The model carries adapters.
        ConfigError: The storage or the block size is not known.
    """
    model = uncompiled(model)
    form = storage_named(storage, block, double_quant)
    check_no_adapters(model, "quantize")
    chosen, skipped = quantizable(model, targets, exclude)
    return quantize_targets(model, chosen, form, skipped, {})


def quantize_targets(
    model: nn.Module,
    targets: Sequence[Target],
    form: QuantizedStorage,
    skipped: Sequence[tuple[str, str]],
    packed: Mapping[str, Packed],
) -> QuantizeReport:
    """Put the weights of layers in this form: those by path in ``packed``, and the others newly quantised."""
    before = base_bytes(model)
    layers = []
    for target in targets:
        weight = target.stored
        dense_bytes = weight.numel() * weight.element_size()
        del weight
        new = packed.get(target.path)
        if new is None:
            with torch.inference_mode(False):
                new = form.encode(target.weight())
        keep_packed(target.module, form, new)
        layers.append(
            QuantizedLayer(target.path, str(target.shape), str(form), new.numel, dense_bytes, new.nbytes)
        )
    return QuantizeReport(tuple(layers), tuple(skipped), before, base_bytes(model))


def dequantize(model: nn.Module) -> list[str]:
    """Make all layers that `quantize` has quantised dense: each weight becomes what its codes stand for.

    Returns:
        The paths of the layers.

    Raises:
        MergeError: The model carries adapters: detach or merge them for good first.
        UnsupportedTargetError: No layer is quantised.
    """
    model = uncompiled(model)
    check_no_adapters(model, "dequantize")
    layers = [(path, m) for path, m in base_modules(model) if quantized_storage(m) is not None]
    if not layers:
        raise UnsupportedTargetError(f"No layer of this {type(model).__name__} was quantised by lorakit.")
    for _, module in layers:
        dequantize_layer(module)
    return [path for path, _ in layers]


def storage_named(storage: str, block: int = 64, double_quant: bool = True) -> QuantizedStorage:
    """The storage of that name.

    Raises:
        ConfigError: There is none, or the block size is not one that it has.
    """
    if storage == "nf4":
        form = NF4Storage(block, double_quant)
        form.encode(torch.empty(0, 0))  # refuses a wrong block size
        return form
    if storage == "int8":
        return Int8Storage()
    raise ConfigError(
        f"No storage is called {storage!r}.{near_matches(str(storage), STORAGES)} Known: {', '.join(STORAGES)}."
    )


def quantizable(
    model: nn.Module, targets: Selector, exclude: Selector | None
) -> tuple[list[Target], list[tuple[str, str]]]:
    """The targets that can be quantised, and those that a preset named and that cannot, with the reason.

    Raises:
        TargetError: Nothing matches, or what is named cannot be quantised.
    """
    by_preset = isinstance(targets, str) and targets in PRESETS
    users: dict[int, int] = {}
    for _, module in base_modules(model):
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    chosen: list[Target] = []
    skipped: list[tuple[str, str]] = []
    for target in find(model, targets, exclude=exclude):
        reason = _why_not(target, users)
        if reason is None:
            chosen.append(target)
        elif by_preset:
            skipped.append((target.path, reason))
        else:
            raise UnsupportedTargetError(f"{target.path!r} cannot be quantised: {reason}.")
    if not chosen:
        reasons = listing(f"{path} ({reason})" for path, reason in skipped)
        raise UnsupportedTargetError(f"targets={targets!r} names no layer that can be quantised: {reasons}.")
    return chosen, skipped


def _why_not(target: Target, users: dict[int, int]) -> str | None:
    """Why a target cannot be quantised, or None when it can."""
    quantized = quantized_storage(target.module)
    if quantized is not None:
        return f"it is {quantized} already"
    if not isinstance(target.storage, DenseStorage):
        return "its weight is kept in few bits already"
    if target.part:
        return "a part of a layer has no weight of its own: name the whole layer"
    if target.shape.kind != "linear":
        return f"only linear layers can be, and this is a {target.shape.kind}"
    if target.binding != "forward":
        return "something else than its own product reads its weight"
    weight = target.stored
    if users[id(weight)] > 1:
        return "another layer uses the same weight, and the tie would be lost"
    if not weight.is_meta and not all_finite(weight):
        return "its weight holds a NaN or an infinity"
    return None


def check_no_adapters(model: nn.Module, what: str) -> None:
    """Raise `MergeError` when adapters are on the model."""
    adapted = [path for path, module in model.named_modules() if HOME in module._modules]
    if adapted:
        raise MergeError(
            f"lorakit.{what} replaces weights that adapters on this model start from or are merged into "
            f"({listing(adapted, most=4)}). Call it before attaching, or take the adapters off first "
            "(lorakit.detach, or lorakit.merge with permanent=True)."
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
