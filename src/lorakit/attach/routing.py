"""Who decides which adapters act: `use` for a block of code, `set_active` for everywhere else.

A route is looked up, never stored in the layers, so two threads (or two asyncio tasks) can run two adapters
of one model at the same time. A route made by `use` lives as long as its block, also in tasks that were
started inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

from lorakit.core.route import OFF, Mix, Route, Rows
from lorakit.errors import RoutingError


class Scope:
    """One open `use` block of one model."""

    __slots__ = ("open", "route", "routing")

    def __init__(self, routing: Routing, route: Route) -> None:
        self.routing, self.route, self.open = routing, route, True


_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("lorakit_scopes", default=())
# Whether a layer runs again under `checkpoint_contexts`: then even "no block was open" is known, and not a guess.
_RERUN: ContextVar[bool] = ContextVar("lorakit_rerun", default=False)
_COUNTING = threading.Lock()


class Routing:
    """The routing state that all slots of one model share.

    Attributes:
        default: What acts outside any `use`, as the user set it.
        merged: What is folded into the weights.
        resting: ``default`` without what is merged: what the slots have to add outside any `use`.
        open_scopes: How many `use` blocks are open, in all threads; while it is 0 no context variable is read.
        open_routes: What they route to, in no particular order.
        ran_scoped_with_grad: Whether a backward pass may follow that belongs to a `use` block.
    """

    def __init__(self) -> None:
        self.default: Mix = OFF
        self.merged: Mix = OFF
        self.resting: Mix = OFF
        self.open_scopes = 0
        self.open_routes: list[Route] = []
        self.ran_scoped_with_grad = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, in this process or another, is in nobody's `use` block.
        return {**self.__dict__, "open_scopes": 0, "open_routes": [], "ran_scoped_with_grad": False}

    def set_default(self, mix: Mix) -> None:
        """Make ``mix`` act outside any `use`; refused when the merged weights cannot give it."""
        self.resting = mix.without(self.merged)
        self.default = mix

    def current(self, training: bool = False) -> Route:
        """The route of a call, made by a layer that is in train mode or not."""
        if self.open_scopes == 0 and not self.ran_scoped_with_grad:
            return self.resting
        if torch.compiler.is_compiling():
            from lorakit.attach.uncompiled import scoped_uncompiled

            return scoped_uncompiled(self, training)
        return scoped(self, training)


def scoped(routing: Routing, training: bool) -> Route:
    """The route of the innermost open `use` block of this model here, or what acts outside any."""
    for scope in reversed(_scopes()):
        if scope.routing is routing and scope.open:
            # Reentrant checkpointing runs forward without grad: in train mode a re-run in backward may follow.
            if not routing.ran_scoped_with_grad and (training or torch.is_grad_enabled()):
                routing.ran_scoped_with_grad = True
            return scope.route
    if routing.ran_scoped_with_grad and torch._C._current_graph_task_id() != -1 and not _RERUN.get():
        raise RoutingError(
            "Activation checkpointing runs this layer again during backward, outside the `use` block of the forward "
            "pass, so the adapter that acted then is not known. Call loss.backward() inside the same "
            "`with lorakit.use(...)`, or choose the adapter with lorakit.set_active, or pass "
            "context_fn=lorakit.checkpoint_contexts (and use_reentrant=False) to the checkpoint function."
        )
    return routing.resting


def _scopes() -> tuple[Scope, ...]:
    own = _SCOPES.get()
    if not own and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls("context"):
        # On a GPU, backward runs in torch's own threads. torch hands them the context of the thread that called it.
        caller = torch._C._get_obj_in_tls("context")
        return own if caller is None else caller.get(_SCOPES, ())
    return own


class use_scope(AbstractContextManager["use_scope"]):  # noqa: N801 - reads as a verb at its only caller
    """The context manager that `use` returns; it may be entered once."""

    def __init__(self, routing: Routing, route: Route) -> None:
        self._routing, self._route, self._merged = routing, route, routing.merged
        self._scope: Scope | None = None

    def __enter__(self) -> use_scope:
        """Open the scope in this thread or task."""
        if self._scope is not None:
            raise RoutingError(
                "This `use` block was entered already; call lorakit.use again for another one."
            )
        if self._routing.merged is not self._merged:
            raise RoutingError(
                "The model was merged or unmerged after this `use` was made; call lorakit.use again."
            )
        self._scope = Scope(self._routing, self._route)
        with _COUNTING:
            self._routing.open_scopes += 1
            self._routing.open_routes.append(self._route)
        _SCOPES.set((*_SCOPES.get(), self._scope))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, whatever happened inside."""
        scope = self._scope
        assert scope is not None
        scope.open = False
        with _COUNTING:
            self._routing.open_scopes -= 1
            self._routing.open_routes.remove(self._route)
        _SCOPES.set(tuple(s for s in _SCOPES.get() if s is not scope))


def route_of(
    route: str | Mapping[str, float] | Sequence[str] | None,
    rows: Sequence[str | Mapping[str, float] | None] | None,
) -> Route:
    """The route that the arguments of `use` mean."""
    if rows is None:
        return Mix.of(route)
    if route is not None:
        raise RoutingError("Give either one route for the whole batch or rows=..., not both.")
    return Rows.of(rows)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` for ``torch.utils.checkpoint``: backward re-runs the layers under the forward's routes.

    Needed only when ``backward()`` is called outside the ``with lorakit.use(...)`` of the forward pass:
    ``checkpoint(f, x, use_reentrant=False, context_fn=lorakit.checkpoint_contexts)``, or with transformers
    ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    lorakit.checkpoint_contexts})``.
    """
    then = [(scope.routing, scope.route) for scope in _SCOPES.get() if scope.open]
    return nullcontext(), _again(then)


@contextmanager
def _again(then: Sequence[tuple[Routing, Route]]) -> Iterator[None]:
    scopes = [use_scope(routing, route) for routing, route in then]
    for scope in scopes:
        scope.__enter__()
    token = _RERUN.set(True)
    try:
        yield
    finally:
        _RERUN.reset(token)
        for scope in reversed(scopes):
            scope.__exit__(None, None, None)
