"""A slot: the adapters of one target, and how a route runs through them.

It is a child module of the layer (``layer.lorakit.output`` or ``layer.lorakit.<parameter>``), so the layer's
own names, class and state-dict keys stay as they are, and ``train``, ``to``, ``state_dict`` and
``parameters`` reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from lorakit.attach.routing import Routing
from lorakit.core.method import DeltaMethod, Factors, LowRankMethod, Method
from lorakit.core.route import Mix, Route, Rows
from lorakit.core.target import Target
from lorakit.core.walk import HOME
from lorakit.errors import RoutingError
from lorakit.ops import add_low_rank
from lorakit.ops.native import load as native

OUTPUT = "output"


class AdapterParameters(nn.Module):
    """The parameters of one adapter at one target."""

    method: Method

    def __init__(self, method: Method, parameters: Mapping[str, nn.Parameter], training: bool) -> None:
        super().__init__()
        self._parameters.update(parameters)
        # Plain facts: to set them as attributes costs more, for nn.Module looks whether each is a parameter.
        self.__dict__.update(method=method, training=training)


class Slot(nn.Module):
    """The adapters of one target. Adapter names are the names of its child modules."""

    def __init__(self, target: Target, routing: Routing) -> None:
        super().__init__()
        self.target, self.routing = target, routing
        self.ran = False
        self.hook_id = -1

    def put(self, name: str, adapter: AdapterParameters) -> None:
        """Add an adapter; any name works, also one that is an attribute of modules."""
        self._modules[name] = adapter
        adapter.__dict__["direct_scales"] = self._direct_scales(adapter)

    def _direct_scales(self, adapter: AdapterParameters) -> tuple[float | None, float | None] | None:
        """The scales of ``y += scale * x lora_Aᵀ lora_Bᵀ``, in eval and train mode, where that is all of a call.

        It is what `native.layer` does by itself; None where the adapter must be asked.
        """
        target, method, p = self.target, adapter.method, adapter._parameters
        whole = target.binding == "forward" and not target.part and target.add_low_rank is add_low_rank
        if not whole or p.keys() != {"lora_A", "lora_B"} or not isinstance(method, LowRankMethod):
            return None

        def scale(training: bool) -> float | None:
            product = method.added_product(target, p, training=training)  # type: ignore[arg-type]
            own = product is not None and product.A is p["lora_A"] and product.B is p["lora_B"]
            return float(product.scale) if product is not None and own else None

        return scale(training=False), scale(training=True)

    def adapter(self, name: str) -> AdapterParameters | None:
        """The adapter of that name, if it has parameters here."""
        return self._modules.get(name)  # type: ignore[return-value]

    # ---- a hooked layer's output
    def adapt_output(self, x: Tensor, y: Tensor, seen: bool = False) -> Tensor:
        """The layer's output under the route of this call.

        Args:
            x: The layer's input.
            y: Its base output, which is reused unless it was ``seen``.
            seen: Whether somebody else holds ``y`` already.
        """
        if not self.ran and not torch.compiler.is_compiling():
            self.ran = True
        route = self.routing.current(self.training)
        if seen and self._acts(route):
            y = y.clone()
        if y.is_nested:
            return self._nested(route, x, y)
        if self.target.part:
            return self._in_part(route, x, y)
        return self._mix(route, x, y) if isinstance(route, Mix) else self._rows(route, x, y)

    def product_alone(self) -> Factors | None:
        """The low-rank product with the input that is all this slot would add in a call now, if that is so."""
        route = self.routing.current(self.training)
        adapter: Any = None if route.only is None or self.target.part else self._modules.get(route.only)
        if adapter is None or not isinstance(adapter.method, LowRankMethod):
            return None
        self.ran = True
        return adapter.method.added_product(self.target, adapter._parameters, training=self.training)

    def _acts(self, route: Route) -> bool:
        """Whether an adapter of the route has parameters here."""
        return any(name in self._modules for name in route.names)

    def _in_part(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        """The whole output, with the part of it that belongs to a slice adapted."""
        if not self._acts(route):
            return y
        part = self.target.select(y)
        changed = self._mix(route, x, part) if isinstance(route, Mix) else self._rows(route, x, part)
        return self.target.insert(y, changed)

    def _mix(self, mix: Mix, x: Tensor, y: Tensor) -> Tensor:
        target, training, weights = self.target, self.training, mix.weights
        if mix.only is not None:
            only: Any = self._modules.get(mix.only)
            if only is None:
                return y
            return only.method.forward(target, only._parameters, x, y, training=training)
        acting = [(self._modules[name], weight) for name, weight in weights if name in self._modules]
        if all(isinstance(adapter.method, DeltaMethod) for adapter, _ in acting):  # type: ignore[union-attr]
            for adapter, weight in acting:
                y = adapter.method.add_to(target, adapter._parameters, x, y, weight=weight, training=training)  # type: ignore[operator, union-attr]
            return y
        total = y.clone()
        for adapter, weight in acting:
            changed = adapter.method.forward(target, adapter._parameters, x, y.clone(), training=training)  # type: ignore[union-attr]
            total = total + weight * (changed - y)
        return total

    def _nested(self, route: Route, x: Tensor, y: Tensor) -> Tensor:
        """Rows of different lengths in one nested tensor, as ``nn.TransformerEncoder`` makes of padded input."""
        if not isinstance(route, Mix) or y.layout is not torch.strided:
            raise RoutingError(
                f"{self.target.path!r} received a nested tensor ({y.layout}), whose rows cannot be routed one by one. "
                "Pass padded tensors (nn.TransformerEncoder: enable_nested_tensor=False)."
            )
        packed = x.contiguous().values().view(-1, self.target.in_)
        values = y.contiguous().values().view(-1, y.size(-1))
        tokens = (
            self._in_part(route, packed, values) if self.target.part else self._mix(route, packed, values)
        )
        if tokens.requires_grad:
            raise RoutingError(
                f"{self.target.path!r} received a nested tensor, and torch cannot differentiate what follows. "
                "Run under torch.no_grad(), or in train mode (nn.TransformerEncoder then keeps the padding)."
            )
        lengths = [row.shape[0] for row in y.unbind()]
        return torch.nested.as_nested_tensor(list(tokens.split(lengths)))

    def _rows(self, route: Rows, x: Tensor, y: Tensor) -> Tensor:
        shape = self.target.shape
        batched = x.dim() >= (
            1 if shape.lookup else len(shape.kernel) + 2
        )  # else dimension 0 is not the batch
        if not batched or x.shape[0] != len(route.index):
            if (
                x.dim() >= 2 and x.shape[0] == 1 and x.shape[1] == len(route.index)
            ):  # one packed row: a route per token
                return self._rows(route, x[0], y[0]).unsqueeze(0)
            raise RoutingError(
                f"rows names {len(route.index)} rows, but {self.target.path!r} received an input of size "
                f"{tuple(x.shape)}: "
                "give one entry per row of the batch (after any repetition by beams), or per token of one "
                "packed row."
            )
        if not torch.is_grad_enabled():
            for mix, rows in route.groups:
                if any(name in self._modules for name in mix.names):
                    part = y[rows]
                    changed = self._mix(mix, x[rows], part)
                    if changed is not part or not isinstance(rows, slice):
                        y[rows] = changed
            return y
        pieces = [self._mix(mix, x[rows], y[rows].clone()) for mix, rows in route.groups]
        _, back = route.places()
        return torch.cat(pieces).index_select(0, back.to(y.device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # In a new process torch counts its hooks from 0: it must not give this slot's number to another hook.
        taken = self.__dict__.get("hook_id", -1)
        RemovableHandle.next_id = max(RemovableHandle.next_id, taken + 1)

    # ---- a bound parameter's value
    def effective(self, base: Tensor, so_far: Tensor) -> Tensor:
        """The value that the layer reads for its parameter under the route of this call.

        Args:
            base: The stored value; every change is measured from it.
            so_far: The same with the changes of other slots, of other slices of the parameter.
        """
        if not self.ran and not torch.compiler.is_compiling():
            self.ran = True
        route = self.routing.current(self.training)
        if not isinstance(route, Mix):
            raise RoutingError(
                f"rows=... cannot reach {self.target.path!r}: it was read outside the forward pass of its "
                "own module. "
                "Run the rows of each adapter in a call of their own."
            )
        acting = [(self._modules[name], weight) for name, weight in route.weights if name in self._modules]
        if not acting:
            return so_far
        W = self.target.to_matrix(base)
        total = W if so_far is base else self.target.to_matrix(so_far)
        for adapter, weight in acting:
            total = adapter.method.fold(self.target, adapter._parameters, total, W, weight)  # type: ignore[operator, union-attr]
        return self.target.replaced(so_far, total)


def output_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer; a plain function, so copies and pickles of the model work.

    It runs for every layer and token, mostly with one adapter and outside any `use`. That way is compiled, and written
    out here for where it is not: the layer's weight has emptied the caches, and each further function of Python takes
    a microsecond to come back.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    if native.layer is not None and not is_dynamo_compiling():
        added = native.layer(module, x, output)
        if added is not None:
            return added
    # The output may be reused only if nobody else has seen it: no hook that ran before this one, no patched forward.
    first = next(iter(module._forward_hooks))
    patched = bool(_global_forward_hooks) or "forward" in module.__dict__
    slot: Any
    for slot in module._modules[HOME]._modules.values():  # type: ignore[union-attr]
        target, routing = slot.target, slot.routing
        if target.binding != "forward":
            continue
        seen = patched or first != slot.hook_id
        scoped = routing.open_scopes or routing.ran_scoped_with_grad
        only = None if scoped or seen or target.part else slot._modules.get(routing.resting.only)
        if only is None or not slot.ran or output.is_nested:
            output = slot.adapt_output(x, output, seen)
        else:
            output = only.method.forward(target, only._parameters, x, output, training=slot.training)
    return output
