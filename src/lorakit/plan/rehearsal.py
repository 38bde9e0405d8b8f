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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.attach import attach, checkpoint_contexts, detach
from lorakit.core.adapter import AdapterState, shared_shapes
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.plan.counting import Counts
from lorakit.plan.device_kernels import Device, DeviceKernels
from lorakit.plan.live_bytes import LiveBytes

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

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], learnt: int) -> Tensor | None:
        """The loss of a batch, of which some tokens are learnt; None for that of the model's whole logits."""


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
        selected: float | None = None,
        padded: bool = False,
        written: int | None = None,
        accumulating: bool = False,
        form: StepForm | None = None,
    ) -> Step:
        """Forward and backward pass of one batch, as `lorakit train` makes them.

        Args:
            batch: Rows; of images, images.
            length: Tokens in each; of an encoder-decoder, those that it reads.
            checkpointing: Whether each layer's activations are computed again in backward.
            packing: Whether the rows lie in one row, with attention inside each.
            learnt: The share of positions that the loss needs.
            selected: The share of positions that have logits, where the model can leave some out; None for ``learnt``.
            padded: Whether rows are filled up to the longest, so that attention has a mask.
            written: Tokens that an encoder-decoder writes in each row; None for as many as it reads.
            accumulating: Whether gradients of an earlier batch are there (they are part of the peak in any case).
            form: How it is computed where that is not the model's own code alone.
        """
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad] if accumulating else []
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        there = sum(p.numel() * p.element_size() for p in trained)
        _checkpoint(self.model, checkpointing, DeviceKernels(self.device, batch if packing else 1))
        inputs = self._inputs(
            batch, length, packing, learnt if selected is None else selected, padded=padded, written=written
        )
        number = max(1, round(learnt * inputs.get("decoder_input_ids", next(iter(inputs.values()))).numel()))
        try:
            documents = batch if packing else 1
            around = nullcontext() if form is None else form.during(self.model, documents, length)
            with self.routed(length if packing else 1), around, self._counting(documents, padded) as live:
                loss = None if form is None else form.loss(self.model, inputs, number)
                if loss is None:
                    loss = _loss(self.model(**inputs), number)
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
    def _counting(self, documents: int, padded: bool = False) -> Iterator[LiveBytes]:
        live = LiveBytes(padded)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            live.ignore(tensor)
            if tensor.grad is not None:
                live.ignore(tensor.grad)
        with DeviceKernels(self.device, documents), live:
            yield live

    def _inputs(
        self,
        batch: int,
        length: int,
        packing: bool,
        selected: float,
        *,
        padded: bool = False,
        written: int | None = None,
    ) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        if getattr(self.model, "main_input_name", "input_ids") == "pixel_values":
            side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]  # type: ignore[union-attr]
            size = (batch, config.num_channels, side, side)  # type: ignore[union-attr]
            return {"pixel_values": torch.empty(size, dtype=self.dtype, device=_META)}
        rows, tokens = (1, batch * length) if packing else (batch, length)
        ids = torch.empty((rows, tokens), dtype=torch.long, device=_META)
        inputs: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.new_empty((rows, written or tokens))
        if padded and _takes(self.model, "attention_mask"):
            inputs["attention_mask"] = torch.empty_like(ids)
        if _takes(self.model, "use_cache"):
            inputs["use_cache"] = False
        if _takes(self.model, "logits_to_keep"):
            needed = max(1, round(tokens * selected))
            inputs["logits_to_keep"] = torch.empty(needed, dtype=torch.long, device=_META)
        return inputs


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _loss(out: Any, learnt: int) -> Tensor:
    """Cross-entropy of tokens or labels as `lorakit train` computes it; of a model without a head, a sum."""
    logits = getattr(out, "logits", None)
    if logits is None:
        return out.last_hidden_state.float().sum()
    del out  # as in training, which lets go of the logits that it does not take
    if logits.dim() == 3:
        logits = taken(logits, learnt)
    labels = torch.empty(logits.shape[:-1], dtype=torch.long, device=_META)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum")


def taken(states: Tensor, number: int) -> Tensor:
    """Those of some tokens ``(number, n)`` out of ``(rows, tokens, n)``: a copy, unless that is all of them."""
    states = states.reshape(-1, states.shape[-1])
    if number >= len(states):
        return states
    return states[torch.empty(number, dtype=torch.long, device=states.device)]


def empty_state(counts: Counts) -> AdapterState:
    """The adapter with sizes and no numbers."""
    methods = {path: _without_dropout(method) for path, method in counts.spec.methods.items()}
    spec = dataclasses.replace(counts.spec, methods=methods)

    def empty(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.empty(size, device=_META) for name, size in sizes.items()}

    tensors = {path: empty(method.shapes(spec.shapes[path])) for path, method in spec.methods.items()}
    return AdapterState(spec, tensors, empty(shared_shapes(spec.methods)))


def _contexts(
    kernels: DeviceKernels | None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
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


def _checkpoint(model: nn.Module, wanted: bool, kernels: DeviceKernels | None) -> None:
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
