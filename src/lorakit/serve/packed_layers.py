"""Hooks on single layers of a model that runs packed rows, where the route of the whole row would not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorakit.attach.routing import use_scope
from lorakit.core.walk import HOME


class PackedLayer:
    """Gives a layer a route of its own.

    The output layer sees only the rows whose logits are wanted. And a layer whose own parameters are adapted (a norm, a
    layer that is replaced by a trained copy) runs once for each adapter: so no others than those that act in it should
    be told apart there, and the tokens of a row ``(1, T, ...)`` have to come as rows ``(T, ...)``, which such a layer
    treats alike.
    """

    def __init__(
        self, layer: nn.Module, scope_of: Callable[[nn.Module], use_scope | None], *, flatten: bool
    ) -> None:
        """Put the hooks on a layer.

        Args:
            layer: The layer.
            scope_of: The scope that a call of it runs in; None leaves the route as it is.
            flatten: Whether it is shown the tokens of a row as rows.
        """
        self._scope_of, self._flatten = scope_of, flatten
        self._scope: use_scope | None = None
        self._flattened = False
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._scope = self._scope_of(module)
        if self._scope is not None:
            self._scope.__enter__()
        first = args[0] if args and self._flatten else None
        self._flattened = isinstance(first, Tensor) and first.dim() > 1 and first.shape[0] == 1
        return (first[0], *args[1:]) if self._flattened else None  # type: ignore[index]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.__exit__(None, None, None)
        return output[None] if self._flattened and isinstance(output, Tensor) else None


def is_leaf(module: nn.Module) -> bool:
    """Whether a layer has no layers inside, so that it computes from its own parameters alone."""
    return not any(name != HOME for name, _ in module.named_children())


def acting_in(module: nn.Module) -> set[str]:
    """The adapters that have parameters in a layer."""
    home = module._modules.get(HOME)
    slots = () if home is None else home._modules.values()
    return {name for slot in slots if slot is not None for name in slot._modules}
