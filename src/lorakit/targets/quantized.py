"""Quantised weights: the layer keeps codes and scales in place of its weight, and multiplies by what they stand for.

The layer stays the user's layer: the same object at the same path, an instance of its class (of a subclass that is
made here, by the same name), with the same bias, hooks and children. The codes and scales are buffers,
``weight_codes``, ``weight_absmax`` and so on, so they move, are copied, pickled and saved with the model; a cast of the
model changes the dtype that it computes in and leaves them as they are. ``layer.weight`` gives the dense values, made
anew at each reading and not to be written to. Only linear layers, ``nn.Linear`` and transformers' ``Conv1D``, are kept
this way.
"""

from __future__ import annotations

import copyreg
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorakit.core.target import Storage
from lorakit.ops import Packed, packed_linear, quantize_int8, quantize_nf4
from lorakit.ops.int8 import Int8
from lorakit.ops.nf4 import NF4

_KEPT = "_lorakit_quantized"


class QuantizedStorage(Storage):
    """Codes and scales in buffers of the layer.

    ``store`` quantises, and so is lossy: what is read back is near to what was stored, not equal to it. ``snapshot``
    and ``restore`` keep every bit.
    """

    kind: ClassVar[str]

    @abstractmethod
    def encode(self, matrix: Tensor) -> Packed:
        """A matrix ``(out, in)`` in this form."""

    @abstractmethod
    def packed(self, tensors: Mapping[str, Tensor], size: tuple[int, ...]) -> Packed:
        """The form made of its stored tensors."""

    def load(self, module: nn.Module, name: str) -> Tensor:
        """What the codes stand for, in the dtype that the layer computes in."""
        kept = kept_by(module)
        W = packed_weight(module).dequantize(kept.dtype)
        return W.mT if kept.transposed else W

    def store(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Quantise a dense value, with new scales, and put it in place. Lossy."""
        kept = kept_by(module)
        device = packed_weight(module).tensors["codes"].device
        matrix = value.to(device)
        put(module, self.encode(matrix.mT if kept.transposed else matrix))

    def snapshot(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """The codes and scales themselves: ``store`` puts others in place and never writes to them."""
        return dict(packed_weight(module).tensors)

    def restore(self, module: nn.Module, name: str, snapshot: dict[str, Tensor]) -> None:
        """The same codes and scales, on the module's present device."""
        device = packed_weight(module).tensors["codes"].device
        put(module, self.packed({k: t.to(device) for k, t in snapshot.items()}, kept_by(module).size))

    def stand_in(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the dense value's size, dtype and device, without its numbers."""
        kept = kept_by(module)
        device = packed_weight(module).tensors["codes"].device
        nothing = torch.empty((), dtype=kept.dtype, device=device).expand(kept.size)
        return nothing.mT if kept.transposed else nothing


@dataclass(frozen=True)
class NF4Storage(QuantizedStorage):
    """Four bits a number, see `lorakit.ops.nf4`.

    Attributes:
        block: Numbers that share a scale.
        double_quant: Whether the scales are kept in eight bits.
    """

    block: int = 64
    double_quant: bool = True

    kind: ClassVar[str] = "nf4"

    def __str__(self) -> str:
        return f"nf4(block={self.block}{', double_quant' if self.double_quant else ''})"

    def encode(self, matrix: Tensor) -> NF4:
        """Blocks run along the inputs of one output feature after another."""
        return quantize_nf4(matrix, self.block, self.double_quant)

    def packed(self, tensors: Mapping[str, Tensor], size: tuple[int, ...]) -> NF4:
        """The form made of its stored tensors."""
        return NF4(
            tensors["codes"],
            tensors["absmax"],
            tensors.get("absmax_scale"),
            tensors.get("absmax_mean"),
            size,
            self.block,
        )


@dataclass(frozen=True)
class Int8Storage(QuantizedStorage):
    """Eight bits a number and one scale for each output feature, see `lorakit.ops.int8`."""

    kind: ClassVar[str] = "int8"

    def __str__(self) -> str:
        return "int8"

    def encode(self, matrix: Tensor) -> Int8:
        """One scale for each output feature."""
        return quantize_int8(matrix)

    def packed(self, tensors: Mapping[str, Tensor], size: tuple[int, ...]) -> Int8:
        """The form made of its stored tensors."""
        return Int8(tensors["codes"], tensors["absmax"], size)


@dataclass
class Kept:
    """What a quantised layer knows about its weight beside the codes and scales.

    Attributes:
        storage: The form.
        size: Of the matrix, ``(out, in)``.
        transposed: Whether the layer's own weight is ``(in, out)``.
        dtype: What the layer computes in.
        requires_grad: Of the parameter that the codes stand for, for when it comes back.
    """

    storage: QuantizedStorage
    size: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype
    requires_grad: bool


def kept_by(module: nn.Module) -> Kept:
    """What a quantised layer knows about its weight."""
    kept: Kept = module.__dict__[_KEPT]
    return kept


def quantized_storage(module: nn.Module) -> QuantizedStorage | None:
    """How a layer's weight is quantised, or None when it is not (by lorakit)."""
    kept: Kept | None = module.__dict__.get(_KEPT)
    return None if kept is None else kept.storage


def dense_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class that a quantised layer's class was made from; of any other layer its own."""
    return getattr(stock, "_lorakit_dense_class", stock)


def packed_weight(module: nn.Module) -> Packed:
    """The weight of a quantised layer, in its stored form."""
    kept, buffers = kept_by(module), module._buffers
    tensors = {
        key.removeprefix("weight_"): t for key in _names(kept.storage) if (t := buffers.get(key)) is not None
    }
    return kept.storage.packed(tensors, kept.size)


def put(module: nn.Module, packed: Packed) -> None:
    """Make this the stored form of a quantised layer's weight."""
    for name, tensor in packed.tensors.items():
        module._buffers[f"weight_{name}"] = tensor


def keep_packed(module: nn.Module, storage: QuantizedStorage, packed: Packed) -> None:
    """Put an encoded matrix ``(out, in)`` in place of the weight of a dense linear layer."""
    weight = module._parameters["weight"]
    assert weight is not None
    transposed = not isinstance(module, nn.Linear)
    del module._parameters["weight"]
    put(module, packed)
    module.__dict__[_KEPT] = Kept(storage, packed.size, transposed, weight.dtype, weight.requires_grad)
    module.__class__ = quantized_class(type(module))


def dequantize_layer(module: nn.Module) -> None:
    """Make a quantised layer dense: its weight becomes what the codes stand for."""
    kept = kept_by(module)
    value = kept.storage.load(module, "weight").contiguous()
    for key in _names(kept.storage):
        module._buffers.pop(key, None)
    del module.__dict__[_KEPT]
    module.__class__ = dense_class(type(module))
    others = dict(module._parameters)
    module._parameters.clear()  # the weight comes before the bias, as it did
    module._parameters["weight"] = nn.Parameter(value, requires_grad=kept.requires_grad)
    module._parameters.update(others)


def _names(storage: QuantizedStorage) -> tuple[str, ...]:
    form = NF4 if isinstance(storage, NF4Storage) else Int8
    return tuple(f"weight_{field}" for field in form.fields)


# ---- the layer's class -----------------------------------------------------------------------------------------------
class _QuantizedClass(type):
    """The class of the classes below: pickle finds it, and is told how they are made (see the end of this file)."""


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def quantized_class(dense: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a linear layer's class whose weight is quantised; one for all layers alike."""
    if dense not in _MADE:
        body: dict[str, Any] = {
            "__module__": dense.__module__,
            "__qualname__": dense.__qualname__,
            "__doc__": dense.__doc__,
            "_lorakit_dense_class": dense,
            "weight": property(_weight, doc="The dense values, made anew at each reading."),
            "forward": _forward_input if issubclass(dense, nn.Linear) else _forward_x,
            "extra_repr": _extra_repr(dense.extra_repr),
            "_apply": _apply_of(dense._apply),
        }
        _MADE[dense] = cast(type[nn.Module], _QuantizedClass(dense.__name__, (dense,), body))
    return _MADE[dense]


def _weight(module: nn.Module) -> Tensor:
    return kept_by(module).storage.load(module, "weight")


def _forward_input(self: nn.Module, input: Tensor) -> Tensor:
    """The product with what the codes stand for, and the bias."""
    dtype = kept_by(self).dtype
    device = input.device.type
    if not input.is_meta and torch.is_autocast_enabled(device) and input.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input = input.to(dtype)
    if input.dtype is not dtype:
        raise RuntimeError(
            f"This layer computes in {dtype} and was given {input.dtype}: cast one of them (layer.to({input.dtype}))."
        )
    bias = self.bias
    return packed_linear(input, packed_weight(self), None if bias is None else bias.to(dtype))  # type: ignore[arg-type]


def _forward_x(self: nn.Module, x: Tensor) -> Tensor:
    """As above, with the argument's name of ``Conv1D``."""
    return _forward_input(self, x)


def _extra_repr(dense: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        own = dense(self)
        return f"{own}, storage={kept_by(self).storage}".removeprefix(", ")

    return extra_repr


def _apply_of(dense: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Moves and casts of the model: codes and scales follow to a device, and never to another dtype."""

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = kept_by(self)
        own = {key: t for key in _names(kept.storage) if (t := self._buffers.get(key)) is not None}
        for key in own:
            self._buffers[key] = None
        try:
            dense(self, fn, recurse)
        finally:
            self._buffers.update(own)
        for key, t in own.items():
            moved = fn(t)
            self._buffers[key] = moved if moved.dtype is t.dtype else t.to(moved.device)
        kept.dtype = fn(torch.empty(0, dtype=kept.dtype, device=own["weight_codes"].device)).dtype
        return self

    return _apply


def _made_again(cls: type[nn.Module]) -> tuple[Any, ...]:
    """Pickle a class that is made here: from the class that it was made from."""
    return quantized_class, (dense_class(cls),)


copyreg.pickle(_QuantizedClass, _made_again)  # type: ignore[arg-type]
