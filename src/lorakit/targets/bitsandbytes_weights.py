"""Weights that bitsandbytes keeps: those of its ``Linear4bit`` and ``Linear8bitLt`` layers, as transformers loads them.

Such a layer is adapted like any other: its output by a hook, its weight through the storages below. bitsandbytes is
imported only when one of its layers is there. On CPUs with AVX512-BF16 its ``Linear4bit`` repacks its weight, and
rounds the scales to bfloat16, the first time it runs in ``eval()`` without a gradient; both forms are read here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.target import Storage

# Rows that the repacked form interleaves.
_REPACKED_ROWS = 32


class Linear4bitStorage(Storage):
    """The weight of a ``Linear4bit``, NF4 or FP4.

    ``store`` quantises with the layer's own settings, and so is lossy; ``snapshot`` and ``restore`` keep every bit.
    """

    def load(self, module: nn.Module, name: str) -> Tensor:
        """What the codes stand for, in the dtype that was quantised."""
        from bitsandbytes.functional import dequantize_4bit

        weight, state = _weight(module, name), _state(module)
        if getattr(state, "packing_format_for_cpu", False):
            return _repacked_values(weight.detach(), state)
        return dequantize_4bit(weight.detach(), state)

    def store(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Quantise a dense value as the layer did. Lossy."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        old, state = _weight(module, name), _state(module)
        nested = getattr(state, "original_nested", state.nested)
        codes, new_state = quantize_4bit(
            value.to(device=old.device, dtype=_dtype(state)).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
        )
        new = Params4bit(  # a pickled layer has lost the class
            codes,
            requires_grad=False,
            quant_state=new_state,
            blocksize=state.blocksize,
            compress_statistics=nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=module,
            bnb_quantized=True,
        )
        _put(module, name, new, new_state)

    def snapshot(self, module: nn.Module, name: str) -> tuple[nn.Parameter, Any]:
        """The parameter and its state themselves: the layer gets others when something is stored."""
        return _weight(module, name), _state(module)

    def restore(self, module: nn.Module, name: str, snapshot: tuple[nn.Parameter, Any]) -> None:
        """The old parameter, on the module's present device."""
        weight, state = snapshot
        device = _weight(module, name).device
        if weight.device != device:
            weight = weight.to(device)  # type: ignore[assignment]
            state = weight.quant_state  # type: ignore[attr-defined]
        _put(module, name, weight, state)

    def stand_in(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the dense value's size, dtype and device, without its numbers."""
        state = _state(module)
        return torch.empty((), dtype=_dtype(state), device=_weight(module, name).device).expand(*state.shape)


class Linear8bitStorage(Storage):
    """The weight of a ``Linear8bitLt`` with ``has_fp16_weights=False``.

    ``store`` quantises row by row, and so is lossy; ``snapshot`` and ``restore`` keep every bit. In ``train()`` the
    layer multiplies by what the codes stand for; in ``eval()`` it quantises its input too, an error of about 1 %.
    """

    def load(self, module: nn.Module, name: str) -> Tensor:
        """What the codes stand for, float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        codes, scales = _codes_and_scales(module, name)
        return int8_vectorwise_dequant(codes, scales)

    def store(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Quantise a dense value row by row. Lossy."""
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn import Int8Params

        old = _weight(module, name)
        codes, scales, _ = int8_vectorwise_quant(value.to(device=old.device, dtype=torch.float16))
        new = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        module._parameters[name] = new
        module.state.CB = module.state.SCB = None  # type: ignore[union-attr]

    def snapshot(self, module: nn.Module, name: str) -> tuple[nn.Parameter, Any, Any, Any, Any]:
        """The parameter, and where the layer has put its codes and scales: on the weight, or once run on its state."""
        weight: Any = _weight(module, name)
        state: Any = module.state
        return weight, weight.CB, weight.SCB, state.CB, state.SCB

    def restore(
        self, module: nn.Module, name: str, snapshot: tuple[nn.Parameter, Any, Any, Any, Any]
    ) -> None:
        """The old parameter, on the module's present device."""
        device = _weight(module, name).device
        weight: Any = snapshot[0]
        parts = [None if t is None else t.to(device) for t in snapshot[1:]]
        if weight.device != device:
            weight = weight.to(device)
        state: Any = module.state
        weight.CB, weight.SCB, state.CB, state.SCB = parts
        module._parameters[name] = weight

    def stand_in(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the dense value's size, dtype and device, without its numbers."""
        weight = _weight(module, name)
        return torch.empty((), dtype=torch.float32, device=weight.device).expand(*weight.shape)


def bitsandbytes_storage(module: nn.Module) -> Storage | str | None:
    """The storage of a layer of bitsandbytes, why it cannot be read yet, or None for any other layer."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes")}
    weight: Any = module._parameters.get("weight")
    if not names or weight is None or weight.is_meta:  # on meta nothing is quantised, and all facts are there
        return None
    if "Linear4bit" in names:
        if getattr(weight, "quant_state", None) is None:
            return "its Linear4bit is not quantised yet: move the model to its device first"
        return Linear4bitStorage()
    if "Linear8bitLt" in names:
        if weight.dtype is not torch.int8:
            return (
                "its Linear8bitLt keeps float weights: build it with has_fp16_weights=False, and move the "
                "model to its device"
            )
        return Linear8bitStorage()
    return None


def bitsandbytes_layer(stock: type[nn.Module]) -> bool:
    """Whether a class computes what bitsandbytes' linear layers do: a product with the weight, and the bias."""
    kinds = [cls for cls in stock.__mro__ if cls.__name__ in ("Linear4bit", "Linear8bitLt")]
    return bool(kinds) and stock.forward is vars(kinds[0]).get("forward")


def matrix_numel(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: those of the matrix where it holds packed bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def _weight(module: nn.Module, name: str) -> Any:
    return module._parameters[name]


def _state(module: nn.Module) -> Any:
    weight = module._parameters["weight"]
    return weight.quant_state  # type: ignore[union-attr]


def _dtype(state: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(state, "original_dtype", state.dtype)
    return dtype


def _put(module: nn.Module, name: str, weight: nn.Parameter, state: Any) -> None:
    module._parameters[name] = weight
    module.quant_state = state


def _codes_and_scales(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    weight: Any = _weight(module, name)
    state: Any = module.state
    return weight.data, weight.SCB if weight.SCB is not None else state.SCB


def _repacked_values(packed: Tensor, state: Any) -> Tensor:
    """Undo the interleaving of rows that the CPU kernel wants: the values ``(out, in)``."""
    out, width = state.shape
    groups = packed.reshape(-1, _REPACKED_ROWS)
    codes = torch.cat((groups & 15, groups >> 4), -1)
    codes = (
        codes.reshape(out // _REPACKED_ROWS, width // 2, _REPACKED_ROWS, 2)
        .transpose(1, 2)
        .reshape(out, width)
    )
    scales = state.absmax.t().float().repeat_interleave(state.blocksize, 1)
    return (state.code[codes.long()] * scales).to(_dtype(state))
