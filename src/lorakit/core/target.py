"""What a method sees of a layer: one weight, as a stack of matrices ``(*batch, out, in)``.

Layer classes, transposed storage, convolution kernels, groups, experts and quantised bytes all live behind
this line. A new kind of layer is a new ``Target``; a new way to keep the bytes is a new ``Storage``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.ops import kronecker

Kind = Literal["linear", "embedding", "conv", "parameter", "module", "attention", "model"]
Binding = Literal["forward", "parameter", "block", "attention", "inputs"]


@dataclass(frozen=True)
class Shape:
    """The facts of a target that shapes and files depend on; pure data, so it needs no model.

    Attributes:
        kind: ``linear``, ``embedding``, ``conv`` or ``parameter``: a weight. ``module``: a block that maps vectors to
            vectors; ``attention``: an attention whose keys and values can be extended; ``model``: a whole model.
        batch: Leading sizes of the stack: ``()`` for one matrix, ``(groups,)``, ``(experts,)``.
        out: Rows of each matrix.
        in_: Columns of each matrix.
        kernel: Kernel size of a convolution, else ``()``.
        stored: For a bare parameter: the size that it is stored with (a vector of n is seen as ``n x 1``).
    """

    kind: Kind
    out: int
    in_: int
    batch: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    @property
    def lookup(self) -> bool:
        """Whether the input is an index into the columns (an embedding) rather than a vector."""
        return self.kind == "embedding"

    @property
    def channels(self) -> int:
        """Columns for each position of the kernel: input channels (of one group); without a kernel, all columns."""
        return self.in_ // math.prod(self.kernel)

    @property
    def numel(self) -> int:
        """Numbers in the base weight."""
        return math.prod(self.batch) * self.out * self.in_

    def __str__(self) -> str:
        stack = "".join(f"{n} x " for n in self.batch)
        return f"{stack}{self.out} x {self.in_}"


class Storage(ABC):
    """How a weight is kept: turns the stored form into a dense tensor and back.

    ``snapshot`` and ``restore`` make unmerging exact: what ``restore`` puts back is the stored form itself
    (for a quantised weight, the codes and scales), never a recomputed one.
    """

    @abstractmethod
    def load(self, module: nn.Module, name: str) -> Tensor:
        """The dense value of ``module``'s parameter ``name``, detached; the *base*, never an adapted one."""

    def stand_in(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the size, dtype and device of what ``load`` gives, for these facts alone: the parameter."""
        value: Tensor | None = module._parameters.get(name)
        if value is None:
            value = module._buffers[name]
            assert value is not None
        return value

    @abstractmethod
    def store(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put a dense value in place of the stored form, rounding once."""

    @abstractmethod
    def snapshot(self, module: nn.Module, name: str) -> Any:
        """The stored form, to be handed to ``restore``. Must not be affected by a later ``store``."""

    @abstractmethod
    def restore(self, module: nn.Module, name: str, snapshot: Any) -> None:
        """Put the stored form back, bit for bit, following the module's present device and dtype."""


class Target(ABC):
    """One adaptable weight of one module.

    Attributes:
        path: Dotted path from the model's root: of the module for its ``weight``, else of the parameter.
        module: The layer that owns the parameter.
        parameter: The parameter's name in the layer.
        storage: How its bytes are kept.
        shape: The facts: kind, ``batch``, ``out``, ``in_``.
        binding: ``forward`` when the layer's output is adapted by a hook; ``parameter`` when the weight that the
            layer reads is, because no call of the layer could be hooked.
        reader: The module whose forward reads the weight: ``module``, but for the output projection of an attention.
        gain: A constant that the layer multiplies its product by (scaled embeddings); 1 for almost all.
        part: Which of the weight's output rows this is, in the words of the path's brackets; empty for all of them.
        measured: Factors ``(A, B)`` that were computed from data for a start here, see `lorakit.eva`.
    """

    shape: Shape
    gain: float = 1.0
    part: str = ""
    measured: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, path: str, module: nn.Module, parameter: str, storage: Storage, binding: Binding = "forward"
    ) -> None:
        self.path, self.module, self.parameter = path, module, parameter
        self.storage, self.binding = storage, binding
        self.reader = module

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.shape})"

    # ---- facts
    @property
    def batch(self) -> tuple[int, ...]:
        """Leading sizes of the stack of matrices."""
        return self.shape.batch

    @property
    def out(self) -> int:
        """Rows of each matrix: output features."""
        return self.shape.out

    @property
    def in_(self) -> int:
        """Columns of each matrix: input features."""
        return self.shape.in_

    @property
    def stored(self) -> Tensor:
        """The stored tensor; of a weight that is not kept dense, a stand-in of the same size, dtype and device."""
        return self.storage.stand_in(self.module, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if it has one that is added after the product with this weight."""
        return getattr(self.module, "bias", None)

    @property
    def base_bias(self) -> Tensor | None:
        """The bias as the base has it, whatever an adapter of the bias itself makes of it."""
        return None if self.bias is None else self.module._parameters.get("bias")

    @property
    def padding(self) -> int | None:
        """The column that is never trained: that of an embedding's ``padding_idx``."""
        return None

    # ---- views of the base
    def weight(self) -> Tensor:
        """The base weight as a dense stack ``(*batch, out, in)``."""
        return self.to_matrix(self.storage.load(self.module, self.parameter))

    @abstractmethod
    def to_matrix(self, stored: Tensor) -> Tensor:
        """The stored layout as ``(*batch, out, in)``; a view where possible."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of ``to_matrix``."""

    def replaced(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """The stored layout with ``matrix`` in place of what ``to_matrix(stored)`` gave; ``stored`` is not changed."""
        return self.from_matrix(matrix)

    # ---- maps
    @abstractmethod
    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """What the layer computes from ``x`` with the stack ``W`` in place of its weight, without bias."""

    @abstractmethod
    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """``y + scale * apply(dropout(x), B A)`` without forming ``B A``; may reuse the memory of ``y``."""

    def apply_kronecker(self, x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
        """``apply(x, W1 ⊗ W2)``; where that is possible without forming the product, it is not formed."""
        return self.apply(x, kronecker(W1, W2))

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the stack ``W`` in ``apply(x, W)`` from that of its result; in at least float32."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        x = x.to(wide) if x.is_floating_point() else x
        with torch.enable_grad():
            W = torch.zeros(
                *self.batch, self.out, self.in_, dtype=wide, device=gradient.device, requires_grad=True
            )
            (G,) = torch.autograd.grad(self.apply(x, W), W, gradient.to(wide))
        return G

    def scale_out(self, y: Tensor, k: Tensor) -> Tensor:
        """Multiply output feature ``j`` by ``k[j]``; ``k`` is ``(*batch, out)``."""
        return y * k

    def scale_add_bias(self, y: Tensor, bias: Tensor, scale: float) -> Tensor:
        """``y + scale * bias``, with ``bias`` ``(out,)`` laid along the output features."""
        return torch.add(y, bias.to(y.dtype), alpha=scale)

    def add_bias(self, y: Tensor, sign: int = 1) -> Tensor:
        """``y + sign * bias`` for the layer's own bias."""
        return y if self.bias is None else self.scale_add_bias(y, self.bias, sign)

    # ---- slices: when this is a part of a layer's output
    def select(self, y: Tensor) -> Tensor:
        """The part of the layer's output that belongs to this target; a view where possible."""
        return y

    def insert(self, y: Tensor, part: Tensor) -> Tensor:
        """The layer's output ``y`` with ``part`` in place of what ``select(y)`` gave; may reuse the memory of ``y``."""
        return part

    def spread(self, vector: Tensor) -> Tensor:
        """A number for each output feature of this target, as one for each of the layer's; zero for the others."""
        return vector

    def overlaps(self, other: Target) -> bool:
        """Whether this and another target of the same weight have output rows in common."""
        return True

    # ---- for attach
    def arrange(self, role: str, tensor: Tensor) -> Tensor:
        """Lay an adapter's parameter out in memory as this kind of layer reads it fastest."""
        return tensor


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before lorakit bound one of its parameters (see `lorakit.attach.binding`)."""
    return getattr(type(module), "_lorakit_stock_class", type(module))
