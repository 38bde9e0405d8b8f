"""Runs steps on a stock transformers decoder: its own layers, our attention, lorakit's adapters routed per token.

Whatever `lorakit.attach` can put on the model and route row by row can be served, all adapters at once. What a model
or an adapter needs beyond that is found out at the start or in ``prepare``, and refused with the reason.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.attach.active import set_active
from lorakit.attach.attach import attach, detach
from lorakit.attach.attachments import kept_by
from lorakit.attach.routing import use_scope
from lorakit.core.route import Route
from lorakit.errors import AdapterIncompatibleError, LorakitError
from lorakit.serve.inspection import Layout, check_against_stock, check_routing, inspect_model
from lorakit.serve.kv import BLOCK, KVArena
from lorakit.serve.packed_layers import PackedLayer, acting_in, is_leaf
from lorakit.serve.ragged import ragged_step
from lorakit.serve.runner import StepBatch
from lorakit.serve.spans import Spans, of_rows, only, route_of, spans_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.serve.versions import AdapterVersion

_KEPT_ROUTES = 256


class TransformersRunner:
    """Any decoder whose attention can be chosen, with any adapter that can be routed per token.

    Attributes:
        model: The base model; the runner owns it from now on.
        arena: The keys and values.
        vocabulary: Width of the logits.
        context: The most tokens of one request.
        layout: What was found out about its attention.
    """

    def __init__(
        self, model: PreTrainedModel, *, kv_tokens: int = 16_384, context: int | None = None
    ) -> None:
        """Look at the model, and check that packed rows give what the model itself gives.

        Args:
            model: A causal language model. Its attention implementation is replaced.
            kv_tokens: Room for keys and values, in tokens, of all running requests together.
            context: The most tokens of one request; by default what the model allows.

        Raises:
            ModelError: This model cannot be served, and why.
            ConfigError: A value makes no sense.
        """
        self.model = model.eval()
        self.layout: Layout = inspect_model(model)
        allowed = self.layout.context
        self.context = min(kv_tokens // BLOCK * BLOCK, allowed if context is None else min(context, allowed))
        first = next(model.parameters())
        self.arena = self._new_arena(kv_tokens, first)
        self._scratch = self._new_arena(2 * BLOCK + self.layout.probe_tokens, first)
        self._device = first.device
        self._adapter_dtype = torch.float32 if first.dtype == torch.float32 else None
        self._picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._turn, self._model_use = threading.Lock(), threading.Lock()
        self._naming = threading.Lock()
        self._prepared: dict[str, AdapterVersion] = {}
        self._routes: OrderedDict[tuple[Spans, nn.Module | None], Route] = OrderedDict()
        self._head = model.get_output_embeddings()
        self._spans: Spans = ()
        self._head_spans: Spans = ()
        self._packed = {self._head: PackedLayer(self._head, self._scope_of, flatten=True)}
        self.vocabulary = check_against_stock(self, self._scratch)

    def _new_arena(self, tokens: int, like: Tensor) -> KVArena:
        layout = self.layout
        return KVArena(layout.layers, layout.kv_heads, layout.head_dim, tokens, like.dtype, like.device)

    # ---- adapters
    def prepare(self, version: AdapterVersion) -> None:
        """Attach an adapter under its digest; does nothing when it is.

        Raises:
            AdapterIncompatibleError: It does not fit the model, or cannot be routed token by token.
        """
        if self._holds(version):
            return
        for path, method in version.state.spec.methods.items():
            if not method.packable:
                raise AdapterIncompatibleError(
                    f"{version.name!r}: {type(method).__name__} at {path or 'the model'!r} puts something in front of "
                    "a whole request, which cannot be told apart in a row that is packed from many. It cannot be "
                    "served."
                )
        with self._exclusive():
            if self._holds(version):
                return
            try:
                attach(self.model, version.state, name=version.digest, dtype=self._adapter_dtype)
            except LorakitError as error:
                raise AdapterIncompatibleError(f"{version.name!r} cannot be served: {error}") from error
            set_active(self.model, None)
            self._routes.clear()  # what acts in a layer may have changed
            try:
                self._check_routable(version)
            except BaseException:
                detach(self.model, version.digest)
                raise
            with self._naming:
                self._prepared[version.digest] = version

    def forget(self, version: AdapterVersion) -> None:
        """Take an adapter off."""
        with self._exclusive():
            with self._naming:
                if self._prepared.get(version.digest) is not version:
                    return
                del self._prepared[version.digest]
            detach(self.model, version.digest)
            self._routes.clear()

    def _holds(self, version: AdapterVersion) -> bool:
        """Whether this content is attached; from now on for this version, whoever else it was attached for.

        A version that was freed and read again has the same digest. The first one may be forgotten after the second
        one was prepared, and must not take it along.
        """
        with self._naming:
            held = version.digest in self._prepared
            if held:
                self._prepared[version.digest] = version
            return held

    def _check_routable(self, version: AdapterVersion) -> None:
        """Run what does not act on a layer's output once, beside the base: both must get what they get alone."""
        attachments = kept_by(self.model)
        assert attachments is not None
        attached = attachments.adapter(version.digest)
        slots = (*attached.slots.values(), *attached.companions)
        others = [slot.target for slot in slots if slot.target.binding not in ("forward", "block")]
        if not others:
            return
        for target in others:
            layer = target.reader
            if layer not in self._packed:
                self._packed[layer] = PackedLayer(layer, self._scope_of, flatten=is_leaf(layer))
        try:
            apart = check_routing(self._run, self._scratch, version)
        except LorakitError as error:
            raise AdapterIncompatibleError(
                f"{version.name!r} adapts {others[0].path!r}, which cannot be routed token by token: {error}"
            ) from error
        if apart:
            raise AdapterIncompatibleError(
                f"{version.name!r} adapts {others[0].path!r}, and gives something else when other requests are packed "
                "into the same row. It cannot be served."
            )

    # ---- a step
    def step(self, batch: StepBatch) -> Tensor:
        """Logits ``(n, vocabulary)`` in float32 of the rows ``batch.last``; writes keys and values of all rows."""
        with self._exclusive():
            return self._run(batch)

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> Tensor:
        spans = spans_of(batch.segments)
        options: dict[str, Any] = {"logits_to_keep": batch.last} if self._picks_rows else {}
        self._head_spans = of_rows(spans, batch.last) if self._picks_rows else spans
        self._spans = spans
        with self._routed(spans), ragged_step(batch.pieces):
            logits: Tensor = self.model(
                input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, **options
            ).logits[0]
        if not self._picks_rows:
            logits = logits[batch.last]
        return logits.float()

    def _routed(self, spans: Spans) -> AbstractContextManager[object]:
        """The adapters of the rows act inside."""
        attachments = kept_by(self.model)
        return (
            nullcontext() if attachments is None else use_scope(attachments.routing, self._route(spans, None))
        )

    def _scope_of(self, layer: nn.Module) -> use_scope | None:
        """The scope of a layer whose route is not that of the whole row, see `PackedLayer`."""
        attachments = kept_by(self.model)
        if attachments is None:
            return None
        spans = self._head_spans if layer is self._head else self._spans
        return use_scope(attachments.routing, self._route(spans, layer))

    def _route(self, spans: Spans, layer: nn.Module | None) -> Route:
        """The route of a row, or that of a layer in it; the same one while the row's adapters stay the same."""
        route = self._routes.get((spans, layer))
        if route is None:
            route = route_of(spans if layer is None else only(spans, acting_in(layer)))
            self._routes[spans, layer] = route
            if len(self._routes) > _KEPT_ROUTES:
                self._routes.popitem(last=False)
        return route

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The model to oneself. Whoever waits is next: a busy engine cannot keep an adapter from being attached."""
        with self._turn:
            self._model_use.acquire()
        try:
            yield
        finally:
            self._model_use.release()
