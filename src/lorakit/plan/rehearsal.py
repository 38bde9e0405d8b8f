"""Rehearsing a step: the model's own forward and backward pass on the meta device, with every live byte counted.

On the meta device tensors have sizes and no numbers, so a step of a 7B model takes seconds and no memory; but autograd
keeps and frees exactly what it would keep and free in earnest: the input of an adapted layer once for q, k and v,
``x Aᵀ``, the inputs of norms and activation functions, residuals, logits; nothing for the weight of a frozen layer. The
peak is read off, not derived, so an architecture or a method that was never thought of is counted right too.

The one thing that a rehearsal does not see is memory inside a kernel (workspaces of matrix products).
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.attach import attach, checkpoint_contexts, detach
from lorakit.core.adapter import AdapterState, shared_shapes
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.plan.counting import Counts

Device = Literal["cpu", "cuda"]

_META = torch.device("meta")


class Step(NamedTuple):
    """What a rehearsed pass needs beside weights, adapters and optimizer.

    Attributes:
        peak: Most bytes alive at one time; in training, gradients of parameters included.
        kept: Bytes alive between the forward and the backward pass; of inference, after the pass (the cache).
    """

    peak: int
    kept: int


class StepForm(Protocol):
    """How a step is computed where that is not the model's own code alone."""

    def during(self, model: nn.Module, documents: int, length: int) -> AbstractContextManager[None]:
        """What the passes run in; ``documents`` of ``length`` tokens lie in a row."""

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """The loss of a batch; None for that of the model's whole logits."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that come to be inside the block, until they are freed.

    Attributes:
        live: Bytes alive now.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, object] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a tensor that was there before; the caller keeps it alive."""
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Asked of a mask: is all of it set? Rows are rehearsed without padding, so it is.
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._watch(value)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.ref(storage, freed)


class _Kernels(TorchFunctionMode):
    """Chooses the kernels that the real device would choose: the meta device has none of its own."""

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
        masked = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or masked or (dropout_p and self.device == "cpu"):
            return F.scaled_dot_product_attention(  # by plain products, which keep the probabilities
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        if self.documents > 1 and query.shape[0] == 1 and query.shape[2] % self.documents == 0:
            pieces = zip(*(t.chunk(self.documents, dim=2) for t in (query, key, value)), strict=True)
            return torch.cat([_flash(q, k, v, None, is_causal, scale) for q, k, v in pieces], dim=2)
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


class Rehearsal:
    """A model with an adapter, both on the meta device, ready to be stepped through for any batch and length.

    Args:
        model: On the meta device. It is changed: what it carries at the end is for rehearsing only.
        counts: The adapter; None for the base model alone.
        device: Whose kernels are assumed.
        dtype: Of the base.
        adapter_dtype: Of the adapter's numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        counts: Counts | None,
        *,
        device: Device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.device, self.dtype = model.to(dtype), device, dtype
        if counts is not None:
            attach(model, empty_state(counts), name="planned", dtype=adapter_dtype, trainable=True)

    def close(self) -> None:
        """Take the adapter off again."""
        detach(self.model, "planned")

    def train_step(
        self,
        batch: int,
        length: int,
        *,
        checkpointing: bool = False,
        packing: bool = False,
        learnt: float = 1.0,
        accumulating: bool = False,
        form: StepForm | None = None,
    ) -> Step:
        """Forward and backward pass of one batch, as `lorakit train` makes them.

        Args:
            batch: Rows; of images, images.
            length: Tokens in each; of an encoder-decoder, on each side.
            checkpointing: Whether each layer's activations are computed again in backward.
            packing: Whether the rows lie in one row, with attention inside each.
            learnt: The share of positions that the loss needs.
            accumulating: Whether gradients of an earlier batch are there (they are part of the peak in any case).
            form: How it is computed where that is not the model's own code alone.
        """
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad] if accumulating else []
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        there = sum(p.numel() * p.element_size() for p in trained)
        _checkpoint(self.model, checkpointing, _Kernels(self.device, batch if packing else 1))
        inputs = self._inputs(batch, length, packing, learnt)
        try:
            documents = batch if packing else 1
            around = nullcontext() if form is None else form.during(self.model, documents, length)
            with self.routed(length if packing else 1), around, self._counting(documents) as live:
                loss = None if form is None else form.loss(self.model, inputs)
                if loss is None:
                    loss = _loss(self.model(**inputs))
                kept = live.live
                loss.backward()
                peak = live.peak
                del loss
        finally:
            _checkpoint(self.model, False, None)
            for parameter in self.model.parameters():
                parameter.grad = None
        return Step(there + peak, kept)

    def routed(self, entries: int) -> AbstractContextManager[object]:
        """What the passes of a step run in: here the adapter acts by itself.

        Args:
            entries: How many entries of the model's first dimension, or tokens where rows are packed, a row has.
        """
        return nullcontext()

    def inference(self, batch: int, length: int) -> Step:
        """One pass over a prompt with the key-value cache, no gradients."""
        self.model.eval()
        inputs = self._inputs(batch, length, False, 1.0)
        inputs.pop("logits_to_keep", None)
        if "use_cache" in inputs:
            inputs["use_cache"] = True
            if _takes(self.model, "logits_to_keep"):
                inputs["logits_to_keep"] = 1
        with torch.no_grad(), self._counting(1) as live:
            out = self.model(**inputs)
            peak = live.peak
            cache = getattr(out, "past_key_values", None)
            del out
            kept = live.live if cache is not None else 0
            del cache
        return Step(peak, kept)

    @contextmanager
    def _counting(self, documents: int) -> Iterator[LiveBytes]:
        live = LiveBytes()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            live.ignore(tensor)
            if tensor.grad is not None:
                live.ignore(tensor.grad)
        with _Kernels(self.device, documents), live:
            yield live

    def _inputs(self, batch: int, length: int, packing: bool, learnt: float) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        if getattr(self.model, "main_input_name", "input_ids") == "pixel_values":
            side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]  # type: ignore[union-attr]
            size = (batch, config.num_channels, side, side)  # type: ignore[union-attr]
            return {"pixel_values": torch.empty(size, dtype=self.dtype, device=_META)}
        rows, tokens = (1, batch * length) if packing else (batch, length)
        ids = torch.empty((rows, tokens), dtype=torch.long, device=_META)
        inputs: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.empty_like(ids)
        if _takes(self.model, "use_cache"):
            inputs["use_cache"] = False
        if _takes(self.model, "logits_to_keep"):
            needed = max(1, round(tokens * learnt))
            inputs["logits_to_keep"] = torch.empty(needed, dtype=torch.long, device=_META)
        return inputs


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _loss(out: Any) -> Tensor:
    """Cross-entropy of tokens or labels as `lorakit train` computes it; of a model without a head, a sum."""
    logits = getattr(out, "logits", None)
    if logits is None:
        return out.last_hidden_state.float().sum()
    labels = torch.empty(logits.shape[:-1], dtype=torch.long, device=_META)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum")


def empty_state(counts: Counts) -> AdapterState:
    """The adapter with sizes and no numbers."""
    methods = {path: _without_dropout(method) for path, method in counts.spec.methods.items()}
    spec = dataclasses.replace(counts.spec, methods=methods)

    def empty(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.empty(size, device=_META) for name, size in sizes.items()}

    tensors = {path: empty(method.shapes(spec.shapes[path])) for path, method in spec.methods.items()}
    return AdapterState(spec, tensors, empty(shared_shapes(spec.methods)))


def _contexts(kernels: _Kernels | None) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first pass through a layer and of the second."""
    first, again = checkpoint_contexts()

    @contextmanager
    def second() -> Iterator[None]:
        with again, kernels or nullcontext():
            yield

    return first, second()


def _without_dropout(method: Method) -> Method:
    """A method without its own dropout, which keeps a seed and no mask, and which the meta device cannot draw."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.name == "dropout" and value:
            changes["dropout"] = 0.0
        elif isinstance(value, Method) and (inner := _without_dropout(value)) is not value:
            changes[field.name] = inner
    return dataclasses.replace(method, **changes) if changes else method  # type: ignore[type-var]


def _checkpoint(model: nn.Module, wanted: bool, kernels: _Kernels | None) -> None:
    """Transformers' activation checkpointing, which was renamed in its version 5.

    ``backward`` leaves the mode that chooses kernels, so what is computed again there has to enter it again.
    """
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable: Callable[..., None] | None = getattr(model, f"{word}_checkpointing_enable", None)
    if wanted and (enable is None or not getattr(model, "supports_gradient_checkpointing", False)):
        raise ConfigError(f"{type(model).__name__} has no activation checkpointing.")
    if wanted and enable is not None:
        options = {"use_reentrant": False, "context_fn": lambda: _contexts(kernels)}
        enable(**{f"{word}_checkpointing_kwargs": options})
    elif getattr(model, f"is_{word}_checkpointing", False):
        getattr(model, f"{word}_checkpointing_disable")()
        model.disable_input_require_grads()  # type: ignore[operator]  # switched on along with it, and left on
