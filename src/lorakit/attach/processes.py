"""What runs along with the training of an adapter that is on a model."""

from __future__ import annotations

from torch import nn

from lorakit.attach.attachments import attachments_of
from lorakit.core.method import Method
from lorakit.core.process import Site, TrainingProcess
from lorakit.errors import ConfigError


def training_processes(model: nn.Module, name: str = "default", *, total_steps: int) -> list[TrainingProcess]:
    """What the methods of an adapter do beside gradient descent; empty for most methods.

    A method's targets are gathered, wherever in the adapter they are: AdaLoRA shares its budget out among all of its
    targets. `lorakit.core.TrainingProcess` says when to call what; `lorakit train` does it by itself.

    Args:
        model: A model with adapters.
        name: The adapter that is trained.
        total_steps: Optimizer steps of the whole training.

    Raises:
        AdapterNameError: No adapter has that name.
        ConfigError: A schedule does not fit into ``total_steps``.
    """
    if total_steps < 1:
        raise ConfigError(f"total_steps counts the optimizer steps of the training; got {total_steps}.")
    attachments = attachments_of(model)
    slots = attachments.adapter(name).slots
    groups: dict[tuple[type[Method], ...], list[Site]] = {}
    for path, adapter in attachments.parameters_of(name):
        parameters = {key: p for key, p in adapter._parameters.items() if p is not None}
        site = Site(path, slots[path].target, adapter.method, parameters)
        groups.setdefault(_nesting(adapter.method), []).append(site)
    found = (sites[0].method.process(sites, total_steps) for sites in groups.values())
    return [process for process in found if process is not None]


def _nesting(method: Method) -> tuple[type[Method], ...]:
    """The classes of a method and of those inside it."""
    inner = getattr(method, "inner", None)
    return (type(method), *(_nesting(inner) if isinstance(inner, Method) else ()))
