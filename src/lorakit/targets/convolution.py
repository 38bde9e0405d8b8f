"""Convolutions in one, two and three dimensions, with stride, padding of every mode, dilation and groups.

A kernel ``(out, in / groups, *kernel)`` is seen as ``groups`` matrices ``(out / groups, in / groups *
prod(kernel))``.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lorakit.core.target import Binding, Shape, Storage, Target
from lorakit.ops import transformed


class ConvTarget(Target):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    ``A`` is a convolution with the layer's own geometry and r channels a group; ``B`` is a 1x1 convolution.
    """

    module: _ConvNd

    def __init__(self, path: str, module: nn.Module, storage: Storage, binding: Binding = "forward") -> None:
        super().__init__(path, module, "weight", storage, binding)
        conv = cast(_ConvNd, module)
        groups, kernel = conv.groups, tuple(conv.kernel_size)
        self.shape = Shape(
            "conv",
            batch=(groups,) if groups > 1 else (),
            out=conv.out_channels // groups,
            in_=conv.in_channels // groups * math.prod(kernel),
            kernel=kernel,
        )

    def to_matrix(self, stored: Tensor) -> Tensor:
        """Kernels flattened, groups in front; a view."""
        return stored.reshape(*self.batch, self.out, self.in_)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """As the layer keeps it."""
        return matrix.reshape(self.module.out_channels, -1, *self.shape.kernel)

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """The layer's own convolution with another kernel."""
        return self._convolve(x, self.from_matrix(W))

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """A convolution to r channels, then a product of each position with ``B`` into ``y``."""
        r = A.shape[-2]
        x = F.dropout(x, dropout) if dropout else x
        kernel = A.to(x.dtype).reshape(self.module.groups * r, -1, *self.shape.kernel)
        h = self._convolve(x, kernel).to(y.dtype)
        unbatched = y.dim() == len(self.shape.kernel) + 1
        examples = 1 if unbatched else y.shape[0]
        stack = examples * self.module.groups
        positions = math.prod(y.shape[-len(self.shape.kernel) :])
        h = h.reshape(stack, r, positions)
        factor = (
            B.to(y.dtype)
            .reshape(1, self.module.groups, self.out, r)
            .expand(examples, -1, -1, -1)
            .reshape(stack, self.out, r)
        )
        if y.is_contiguous() and not transformed():
            y.view(stack, self.out, positions).baddbmm_(factor, h, alpha=scale)
            return y
        return y.add(torch.bmm(factor, h).view(y.shape), alpha=scale)

    def scale_out(self, y: Tensor, k: Tensor) -> Tensor:
        """One factor a channel."""
        return y * self._along_channels(k)

    def scale_add_bias(self, y: Tensor, bias: Tensor, scale: float) -> Tensor:
        """One number a channel."""
        return torch.add(y, self._along_channels(bias.to(y.dtype)), alpha=scale)

    def _along_channels(self, k: Tensor) -> Tensor:
        return k.reshape(-1, *(1,) * len(self.shape.kernel))

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The module's own forward rule (stride, padding mode, dilation, groups), without bias."""
        forward = self.module._conv_forward
        return forward(x, kernel, None)
