"""Attaching a recipe's adapter, also where its first values are computed: from data (EVA, LoRA-GA) or by LoftQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorakit.attach import AttachReport, attach
from lorakit.attach.attach import fresh_state
from lorakit.attach.calibrate import eva, lora_ga
from lorakit.attach.planning import plan_method
from lorakit.core import AdapterState, Method
from lorakit.errors import ConfigError
from lorakit.methods import LoRA
from lorakit.methods.init import init_called
from lorakit.train.loss import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


def attach_adapter(
    model: PreTrainedModel,
    adapter: Method | Mapping[Any, Method],
    targets: str | Sequence[str] | None,
    *,
    name: str,
    exclude: str | Sequence[str] | None,
    seed: int,
    start: AdapterState | None,
    batches: Callable[[], Iterable[Batch]],
    objective: Objective,
) -> AttachReport:
    """`lorakit.attach`, after measuring what the adapter's start needs.

    Args:
        model: The base model.
        adapter: A method, or a mapping from targets to methods.
        targets: See `lorakit.attach`.
        name: The adapter's name.
        exclude: See `lorakit.attach`.
        seed: Of the first values.
        start: LoftQ's adapter, which stands in place of the LoRA in ``adapter``.
        batches: Makes the batches to measure on, as the collator makes them.
        objective: What will be minimised.

    Raises:
        ConfigError: The adapter would have to be measured in two ways, or the batches are too few.
    """
    if start is not None:
        rest = {} if isinstance(adapter, Method) else {k: m for k, m in adapter.items() if not any(_loras(m))}
        return attach(model, _joined(model, start, rest, seed), name=name, trainable=True)
    methods = [adapter] if isinstance(adapter, Method) else list(adapter.values())
    needs = {init_called(lora.init).needs for method in methods for lora in _loras(method)} - {""}
    if not needs:
        return attach(model, adapter, targets, name=name, exclude=exclude, seed=seed)
    if len(needs) > 1:
        raise ConfigError(f"One adapter cannot start in two measured ways: {' and '.join(sorted(needs))}.")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        here = {key: tensor.to(device) for key, tensor in batch.items()}
        return objective.summed(model, base, here) / objective.count(here)

    base, device = model, next(model.parameters()).device
    if needs == {"lorakit.eva"}:
        state = eva(model, adapter, batches(), targets, exclude=exclude, run=loss, seed=seed)
    else:
        state = lora_ga(model, adapter, batches(), targets, loss=loss, exclude=exclude, seed=seed)
    return attach(model, state, name=name, trainable=True)


def _joined(
    model: PreTrainedModel, start: AdapterState, rest: Mapping[Any, Method], seed: int
) -> AdapterState:
    """An adapter with the fresh start of some other methods beside it."""
    if not rest:
        return start
    other = fresh_state(model, plan_method(model, rest, None, None), seed)
    spec = dataclasses.replace(
        start.spec,
        methods={**start.spec.methods, **other.spec.methods},
        shapes={**start.spec.shapes, **other.spec.shapes},
    )
    return AdapterState(spec, {**start.tensors, **other.tensors}, {**start.shared, **other.shared})


def _loras(method: Method) -> Iterator[LoRA]:
    """The LoRA that a method is or wraps."""
    inner: Any = method
    while isinstance(inner, Method):
        if isinstance(inner, LoRA):
            yield inner
        inner = getattr(inner, "inner", None)
