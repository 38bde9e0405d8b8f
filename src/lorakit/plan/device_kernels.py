"""What the kernels of a real device keep and make for a moment, on the meta device, which has none of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Device = Literal["cpu", "cuda"]


class DeviceKernels(TorchFunctionMode):
    """Chooses the kernels that the real device would choose.

    Args:
        device: The real one.
        documents: How many lie end to end in the one row of a packed batch; 1 for other batches.
    """

    def __init__(self, device: Device, documents: int) -> None:
        super().__init__()
        self.device, self.documents = device, documents

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.device == "cuda":
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if (
            self.documents > 1
            and query.dim() == 4
            and query.shape[0] == 1
            and query.shape[2] % self.documents == 0
        ):
            groups = query.shape[1] // key.shape[1]
            if groups > 1:  # as lorakit.train.packing does
                key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
            pieces = zip(*(t.chunk(self.documents, dim=2) for t in (query, key, value)), strict=True)
            done = [self._one(q, k, v, None, dropout_p, is_causal, scale) for q, k, v in pieces]
            return torch.cat(done, dim=2)
        return self._one(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def _one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of rows, or of one document."""
        masked = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or masked or (dropout_p and self.device == "cpu"):
            return F.scaled_dot_product_attention(  # by plain products, which keep the probabilities
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, query.new_zeros(()), -torch.inf)
        return _flash(query, key, value, attn_mask, is_causal, scale)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention that keeps queries, keys, values, output, and a number for each row of scores."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: tuple[Tensor, Tensor] = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return result[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """With a mask of a byte a number, as CUDA keeps it; the CPU keeps one of the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p else input
