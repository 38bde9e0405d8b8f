"""Watching the frozen base model while it runs: what its layers receive, and the gradients that its weights would have.

Nothing of the model is changed, whatever happens: hooks, modes and ``requires_grad`` flags are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lorakit.attach.attachments import kept_by
from lorakit.attach.routing import use_scope
from lorakit.core.route import OFF
from lorakit.core.target import Target
from lorakit.errors import ConfigError, MergeError, listing
from lorakit.methods.init.eva import Components

Run = Callable[[nn.Module, Any], Any]


# ---- running the model
@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The base model in ``eval()`` and without gradients of its own; everything as before afterwards."""
    existing = kept_by(model)
    if existing is not None and existing.merged:
        raise MergeError(
            f"{listing(existing.routing.merged.names)} is merged into the weights that would be measured. Call "
            "lorakit.unmerge(model) first, or merge with permanent=True."
        )
    off: AbstractContextManager[object] = nullcontext()
    if existing is not None:
        off = use_scope(existing.routing, OFF)
    modes = [(module, module.training) for module in model.modules()]  # those of adapters too
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with off:
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


def run_on(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch: of a mapping's or a sequence's values as arguments, or of a single tensor."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{name: _moved(value, device) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(_moved(value, device) for value in batch))
    return model(_moved(batch, device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model itself computes from a batch.

    Raises:
        ConfigError: It computes none.
    """
    output = run_on(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"{type(model).__name__} computes no loss of its own from a batch (it does from one with labels, in "
            "transformers): pass loss=..., a function of the model and a batch."
        )
    return loss


# ---- what is seen
def kept_tokens(batch: Any, ignored_label: int | None) -> Tensor | None:
    """Which tokens count, ``(rows, tokens)``; None for all."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    kept: Tensor | None = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if ignored_label is None or not isinstance(labels, Tensor) or not isinstance(ids, Tensor):
        return kept
    if labels.shape == ids.shape:  # one for each token
        learnt = labels != ignored_label
        kept = learnt if kept is None else kept & learnt
    return kept


def _rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """The vectors in an input that count, ``(m, in)``; all of an input that has not one for each token."""
    if kept is not None and x.shape[:-1] == kept.shape:
        return x[kept.to(x.device)]
    if kept is not None and x.shape[:-1] == (kept.numel(),):
        return x[kept.reshape(-1).to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def see_inputs(
    model: nn.Module,
    targets: Mapping[str, Target],
    seen: dict[str, Components],
    batch: Any,
    kept: Tensor | None,
    run: Run,
    generator: torch.Generator | None,
) -> None:
    """Run the model on a batch and take the inputs of the targets into account."""
    # Layers that have seen the same so far and receive the same tensor have seen the same again: it is computed once.
    known: dict[tuple[int, int, int], tuple[ref[Tensor], Components, Components]] = {}

    def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, so_far = _input(args, kwargs), seen[path]
        key = (id(x), -1 if x.is_inference() else x._version, id(so_far))
        done = known.get(key)
        if done is None or done[0]() is not x or x.is_inference():
            done = known[key] = (ref(x), so_far, so_far.updated(_rows(x.detach(), kept), generator))
        seen[path] = done[2]

    handles = [
        target.module.register_forward_pre_hook(partial(hook, path), with_kwargs=True)
        for path, target in targets.items()
    ]
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def add_gradients(
    model: nn.Module,
    targets: Mapping[str, Target],
    gradients: dict[str, Tensor],
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Add the gradients of the targets' weights on a batch, without a gradient of any parameter."""
    # Added to every target's output: zero, but from there on gradients flow, though no parameter needs one.
    probes: dict[torch.device, Tensor] = {}

    def hook(
        path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():  # a checkpointed block, which will be run again
            return output
        x = _input(args, kwargs).detach()
        probe = probes.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
        seen = output + probe.to(output.dtype)

        def add(gradient: Tensor) -> None:
            target = targets[path]
            G = target.weight_gradient(x, target.select(gradient))
            if path in gradients:
                gradients[path] += G
            else:
                gradients[path] = G

        seen.register_hook(add)
        return seen

    handles = [
        target.module.register_forward_hook(partial(hook, path), with_kwargs=True)
        for path, target in targets.items()
    ]
    try:
        with torch.enable_grad():
            value = loss(model, batch)
            if probes and value.requires_grad:
                torch.autograd.backward(value, inputs=list(probes.values()))
    finally:
        for handle in handles:
            handle.remove()
