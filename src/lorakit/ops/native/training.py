"""What a training step does between its matrix products, compiled, as Python sees it: plain functions of tensors.

The structure mirrors `training.h`, field by field. Nothing here is known to autograd; see `lorakit.ops.fused`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
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
        self._project = _in_threads(library, "project", P, P, N, N, N, c_double, P)
        self._expand = _in_threads(library, "expand", P, P, N, N, N, N, P)
        self._collect = _in_threads(library, "collect", P, P, N, N, N, P)
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

    def project(self, x: Tensor, M: Tensor, scale: float) -> Tensor:
        """``scale * x Mᵀ`` for ``x`` ``(..., n)`` and ``M`` ``(r, n)``: ``(tokens, r)``."""
        r, n = M.shape
        h = x.new_empty(x.numel() // n, r)
        self._project(_at(x), _at(M), len(h), n, r, scale, _at(h))
        return h

    def expand(self, h: Tensor, M: Tensor, y: Tensor, *, add: bool) -> None:
        """``y = h M``, or ``y += h M``, for ``h`` ``(tokens, r)``, ``M`` ``(r, n)`` and ``y`` ``(..., n)``."""
        r, n = M.shape
        self._expand(_at(h), _at(M), len(h), n, r, int(add), _at(y))

    def collect(self, h: Tensor, x: Tensor) -> Tensor:
        """``hᵀ x`` for ``h`` ``(tokens, r)`` and ``x`` ``(..., n)``: ``(r, n)``."""
        tokens, r = h.shape
        d = x.new_empty(r, x.shape[-1])
        self._collect(_at(h), _at(x), tokens, x.shape[-1], r, _at(d))
        return d

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
