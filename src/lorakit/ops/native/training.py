"""What a training step does between its matrix products, compiled, as Python sees it: plain functions of tensors.

The structures mirror `training.h`, field by field. Nothing here is known to autograd; see `lorakit.ops.fused`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, addressof, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.ops.native.load import LIBRARY, status

_MOST_HEAD = 512


class _Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "cos", "sin", "borders", "y", "logs")),
        *((name, c_void_p) for name in ("dy", "dq", "dk", "dv")),
        *((name, c_int64) for name in ("documents", "heads", "kv_heads", "n", "threads")),
        ("scale", c_double),
    ]


class _Product(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("B", "y", "dy", "dB")),
        *((name, c_int64) for name in ("r", "out")),
        ("scale", c_double),
    ]


class _Products(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "A", "each", "h", "gated", "dgated", "dx", "dA")),
        *((name, c_void_p) for name in ("dh", "next_dh", "next_dA")),
        *((name, c_int64) for name in ("tokens", "n", "r", "count", "threads", "next_r")),
    ]


class ProductInputs(NamedTuple):
    """The low-rank changes of layers that read the same input; all contiguous.

    Attributes:
        x: ``(tokens, n)``.
        A: The factors of all below each other, ``(sum of r, n)``.
        Bs: Of each, transposed: ``(r, out)``.
        scales: Of each.
    """

    x: Tensor
    A: Tensor
    Bs: Sequence[Tensor]
    scales: Sequence[float]


class AttentionInputs(NamedTuple):
    """What attention is made of; all contiguous.

    Attributes:
        q: ``(tokens, heads * n)``, as a projection makes it.
        k: ``(tokens, kv_heads * n)``.
        v: ``(tokens, kv_heads * n)``.
        cos: ``(tokens, n)``.
        sin: ``(tokens, n)``.
        borders: ``(documents + 1,)``, int64.
        scale: Of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    borders: Tensor
    scale: float

    @property
    def heads(self) -> int:
        """Of the queries."""
        return self.q.shape[1] // self.cos.shape[1]


class Kernels:
    """The functions of a loaded library, on contiguous float32 tensors of the CPU; what they return is new."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        library.lorakit_width.restype = c_int64
        self._width: int = library.lorakit_width()
        P, N = c_void_p, c_int64  # and the number of threads, last in each
        self._rms_norm = _in_threads(library, "rms_norm", P, P, N, N, c_double, P, P)
        self._rms_norm_back = _in_threads(library, "rms_norm_back", P, P, P, P, N, N, P)
        self._swiglu = _in_threads(library, "swiglu", P, P, N, P)
        self._swiglu_back = _in_threads(library, "swiglu_back", P, P, P, N, P, P)
        self._cross_entropy = _in_threads(library, "cross_entropy", P, P, N, N, P, P)
        self._add_products = _function(library, "add_products", POINTER(_Products))
        self._add_products_back = _function(library, "add_products_back", POINTER(_Products))
        self._attention = _function(library, "attention", POINTER(_Attention))
        self._attention_back = _function(library, "attention_back", POINTER(_Attention))

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """``weight * x / sqrt(mean(x²) + epsilon)`` for ``x`` ``(..., n)``, and the factors ``(rows,)``."""
        n = x.shape[-1]
        y, factors = torch.empty_like(x), x.new_empty(x.numel() // n)
        self._rms_norm(_at(x), _at(weight), len(factors), n, epsilon, _at(y), _at(factors))
        return y, factors

    def rms_norm_back(self, dy: Tensor, y: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
        """The derivative with respect to ``x``, from the output; no entry of ``weight`` may be 0."""
        dx = torch.empty_like(y)
        self._rms_norm_back(_at(dy), _at(y), _at(weight), _at(factors), len(factors), y.shape[-1], _at(dx))
        return dx

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        y = torch.empty_like(gate)
        self._swiglu(_at(gate), _at(up), gate.numel(), _at(y))
        return y

    def swiglu_back(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives with respect to ``gate`` and ``up``."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._swiglu_back(_at(dy), _at(gate), _at(up), gate.numel(), _at(dgate), _at(dup))
        return dgate, dup

    def cross_entropy(self, logits: Tensor, targets: Tensor, gradient: Tensor | None = None) -> Tensor:
        """``-log softmax(logits)[target]`` of each row, ``(rows,)``.

        Args:
            logits: ``(rows, n)``.
            targets: ``(rows,)``, int64, each from 0 to n - 1.
            gradient: ``(rows, n)``; gets the derivative of the sum, if given.
        """
        rows, n = logits.shape
        losses = logits.new_empty(rows)
        self._cross_entropy(_at(logits), _at(targets), rows, n, _at(losses), _at(gradient))
        return losses

    def add_products(
        self, given: ProductInputs, ys: Sequence[Tensor], *, gated: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add ``scale_i * x A_iᵀ B_iᵀ`` to each ``y_i``.

        Args:
            given: What is multiplied.
            ys: ``(tokens, out)`` each.
            gated: Whether what goes on is ``silu(y_0) * y_1``.

        Returns:
            ``scale_i * x A_iᵀ`` of all, side by side ``(tokens, sum of r)``; and what goes on, if gated.
        """
        h = given.x.new_empty(len(given.x), len(given.A))
        through = torch.empty_like(ys[0]) if gated else None
        call = _products(given, h, [{"y": y} for y in ys])
        call.gated = _at(through)
        self._add_products(byref(call))
        return h, through

    def add_products_back(
        self, given: ProductInputs, h: Tensor, dys: Sequence[Tensor], *, onward: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """The derivatives with respect to ``x``, through the low-rank way alone, to ``A`` and to each ``B``.

        Args:
            given: What was multiplied.
            h: What `add_products` returned.
            dys: The derivative with respect to each ``y_i``.
            onward: Whether that of ``x`` is wanted.
        """
        dx, dA = torch.empty_like(given.x) if onward else None, torch.empty_like(given.A)
        call, dBs = _products_back(given, h, dys)
        call.dx, call.dA = _at(dx), _at(dA)
        self._add_products_back(byref(call))
        return dx, dA, dBs

    def add_product_back_onto(
        self, A: Tensor, B: Tensor, scale: float, h: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one layer whose input is gone.

        Args:
            A: ``(r, n)``.
            B: Transposed: ``(r, out)``.
            scale: Of the product.
            h: What `add_products` returned.
            dy: ``(tokens, out)``.

        Returns:
            With respect to the input ``(tokens, n)``, to ``h`` without the scale ``(tokens, r)`` and to ``B``.
        """
        dx, dh = dy.new_empty(len(dy), A.shape[1]), torch.empty_like(h)
        call, (dB,) = _products_back(ProductInputs(dx, A, [B], [scale]), h, [dy])
        call.x, call.dx, call.dh = None, _at(dx), _at(dh)
        self._add_products_back(byref(call))
        return dx, dh, dB

    def gated_products_back(
        self,
        given: ProductInputs,
        h: Tensor,
        ys: Sequence[Tensor],
        dgated: Tensor,
        next_dh: Tensor | None,
        *,
        onward: bool,
    ) -> tuple[list[Tensor], Tensor | None, Tensor, list[Tensor], Tensor | None]:
        """As `add_products_back`, from the derivative with respect to what went on through a gate.

        Args:
            given: What was multiplied.
            h: What `add_products` returned.
            ys: What it left: of the gate, and of what that lets through.
            dgated: With respect to what went on.
            next_dh: Of a layer that read this: what of its ``h`` goes on to its ``A``, ``(tokens, r)``.
            onward: Whether the derivative of ``x`` is wanted.

        Returns:
            Those of the ``ys``; then what `add_products_back` returns; then that of the next layer's ``A``.
        """
        dx, dA = torch.empty_like(given.x) if onward else None, torch.empty_like(given.A)
        dys = [torch.empty_like(y) for y in ys]
        next_dA = None if next_dh is None else dgated.new_empty(next_dh.shape[1], dgated.shape[1])
        call, dBs = _products_back(given, h, dys, ys)
        call.dx, call.dA, call.dgated = _at(dx), _at(dA), _at(dgated)
        if next_dh is not None:
            call.next_dh, call.next_dA, call.next_r = _at(next_dh), _at(next_dA), next_dh.shape[1]
        self._add_products_back(byref(call))
        return dys, dx, dA, dBs, next_dA

    def takes_heads(self, n: int) -> bool:
        """Whether attention runs with heads of ``n`` entries."""
        return n % self._width == 0 and n % 2 == 0 and n <= _MOST_HEAD

    def attention(self, given: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Causal attention inside each of several documents that lie end to end, with rotary positions.

        Returns:
            ``(tokens, heads * n)``, and the logarithms of the sums of exponentials ``(tokens, heads)``.
        """
        y, logs = torch.empty_like(given.q), given.q.new_empty(given.q.shape[0], given.heads)
        self._attention(byref(_attention(given, y, logs)))
        return y, logs

    def attention_back(
        self, dy: Tensor, given: AttentionInputs, y: Tensor, logs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives with respect to ``q``, ``k`` and ``v``.

        Args:
            dy: Of the output, ``(tokens, heads * n)``.
            given: What `attention` was given.
            y: What it returned.
            logs: What it returned beside that.
        """
        call = _attention(given, y, logs)
        dq, dk, dv = (torch.empty_like(t) for t in (given.q, given.k, given.v))
        call.dy, call.dq, call.dk, call.dv = (_at(t) for t in (dy, dq, dk, dv))
        self._attention_back(byref(call))
        return dq, dk, dv


def kernels() -> Kernels | None:
    """The compiled functions, or None where there are none: `lorakit.ops.native.status` says why."""
    found = status()
    return _loaded(found.folder) if found.state == "compiled" else None


@cache
def _loaded(folder: Path) -> Kernels:
    return Kernels(str(folder / LIBRARY))


def _function(library: ctypes.CDLL, name: str, *types: Any) -> Any:
    function = getattr(library, f"lorakit_{name}")
    function.restype, function.argtypes = None, list(types)
    return function


def _in_threads(library: ctypes.CDLL, name: str, *types: Any) -> Callable[..., None]:
    """A function whose last argument is how many threads of torch there are."""
    function = _function(library, name, *types, c_int64)

    def call(*given: Any) -> None:
        function(*given, torch.get_num_threads())

    return call


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _products(given: ProductInputs, h: Tensor, pointers: Sequence[Mapping[str, Tensor]]) -> _Products:
    x, A, Bs, scales = given
    each = (_Product * len(Bs))()
    for one, B, scale, named in zip(each, Bs, scales, pointers, strict=True):
        one.B, one.r, one.out, one.scale = _at(B), *B.shape, scale
        for name, tensor in named.items():
            setattr(one, name, _at(tensor))
    call = _Products(x=_at(x), A=_at(A), h=_at(h), tokens=len(x), n=x.shape[1], r=len(A), count=len(Bs))
    call.each, call.threads = addressof(each), torch.get_num_threads()
    call.kept = each  # not a field: the memory that `each` points to lives as long
    return call


def _products_back(
    given: ProductInputs, h: Tensor, dys: Sequence[Tensor], ys: Sequence[Tensor] = ()
) -> tuple[_Products, list[Tensor]]:
    """A call that goes back, and where it puts the derivatives with respect to each ``B``, transposed."""
    dBs = [torch.empty_like(B) for B in given.Bs]
    pointers = [{"dy": dy, "dB": dB} for dy, dB in zip(dys, dBs, strict=True)]
    for pointer, y in zip(pointers, ys, strict=False):
        pointer["y"] = y
    return _products(given, h, pointers), dBs


def _attention(given: AttentionInputs, y: Tensor, logs: Tensor) -> _Attention:
    q, k, v, cos, sin, borders, scale = given
    return _Attention(
        *(_at(t) for t in (q, k, v, cos, sin, borders, y, logs)),
        *(None,) * 4,
        len(borders) - 1,
        given.heads,
        k.shape[1] // cos.shape[1],
        cos.shape[1],
        torch.get_num_threads(),
        scale,
    )
