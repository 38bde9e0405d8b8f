"""The two ways to say which adapters act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from lorakit.attach.attachments import attachments_of
from lorakit.attach.routing import route_of, use_scope
from lorakit.core.route import Mix


def use(
    model: nn.Module,
    route: str | Mapping[str, float] | Sequence[str] | None = None,
    *,
    rows: Sequence[str | Mapping[str, float] | None] | None = None,
) -> AbstractContextManager[object]:
    """Run the model with certain adapters inside a ``with`` block, in this thread and asyncio task only.

    Blocks nest; the inner one decides. Nothing about training, gradients or train/eval mode is touched.

    Args:
        model: A model with adapters.
        route: An adapter's name; several names, or ``{name: weight}``, to add their changes up;
            None for the base model.
        rows: One of these for each row of the batch instead: ``["a", "b", None, "a"]``.
            A batch of one packed row may have
            one for each token.

    Raises:
        AdapterNameError: A name is not attached.
        RoutingError: Merged weights cannot give what is asked.
    """
    attachments = attachments_of(model)
    asked = route_of(route, rows)
    attachments.check_names(asked.names)
    rest = asked.without(attachments.routing.merged)
    attachments.check_beside_merged(rest.names)
    return use_scope(attachments.routing, rest)


def set_active(model: nn.Module, route: str | Mapping[str, float] | Sequence[str] | None) -> None:
    """Choose what acts outside any `use` block, in all threads. Costs the same for one adapter or a thousand.

    Args:
        model: A model with adapters.
        route: A name, several names, ``{name: weight}``, or None for the base model.

    Raises:
        AdapterNameError: A name is not attached.
        RoutingError: Merged weights cannot give what is asked.
    """
    attachments = attachments_of(model)
    mix = Mix.of(route)
    attachments.check_names(mix.names)
    attachments.check_beside_merged(mix.names)
    attachments.routing.set_default(mix)
    if attachments.default_before_merge is not None:  # chosen while merged: it holds after unmerging too
        attachments.default_before_merge = mix
    attachments.routing.ran_scoped_with_grad = False
