"""A recipe's base model in few bits, and with LoftQ the start of the adapter that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lorakit.attach import detach, extract, loftq, quantize
from lorakit.core import AdapterState, Method
from lorakit.core.walk import base_modules
from lorakit.errors import ConfigError
from lorakit.targets.quantized import quantized_storage
from lorakit.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "loftq"


def quantize_base(
    model: PreTrainedModel, recipe: Recipe, head: Sequence[str] = ()
) -> tuple[str | None, AdapterState | None]:
    """Quantise a model as a recipe says.

    The same recipe gives the same base each time: what LoftQ computes depends on the weights and the seed alone.

    Args:
        model: A dense model without adapters.
        recipe: With ``model.quantize`` and perhaps ``adapter.loftq_iterations``.
        head: Paths of modules that are trained in full, which stay dense.

    Returns:
        What was done, as text, and LoftQ's adapter; None each where there is none.

    Raises:
        ConfigError: LoftQ is asked for with several methods.
        TargetError: A layer that is named cannot be quantised.
    """
    storage, section = recipe.model.quantize, recipe.adapter
    if storage is None:
        return None, None
    dense = [
        path for path in head if isinstance(model.get_submodule(path), nn.Linear) and _in_body(model, path)
    ]
    if not section.loftq_iterations:
        return str(quantize(model, storage, exclude=dense or None)), None
    method = section.adapter()
    if not isinstance(method, Method):
        raise ConfigError(
            "adapter.loftq_iterations starts one method on all of its targets: use method, not groups."
        )
    exclude = section.exclude if not dense else _both(section.exclude, dense)
    report = loftq(
        model,
        method,
        storage,
        method.default_targets if section.targets is None else section.targets,
        exclude=exclude,
        iterations=section.loftq_iterations,
        name=_NAME,
        decomposition="projection",
        seed=recipe.train.seed_of("init"),
    )
    state = extract(model, _NAME)
    detach(model, _NAME)
    return str(report), state


def check_handed_in(model: PreTrainedModel, recipe: Recipe) -> None:
    """A model that the caller has loaded is not quantised behind its back.

    Raises:
        ConfigError: The recipe asks for a quantised base, and this one is dense; or it asks for LoftQ.
    """
    asked = recipe.model.quantize
    if asked is None:
        return
    if recipe.adapter.loftq_iterations:
        raise ConfigError("adapter.loftq_iterations is for a model that lorakit loads itself: pass no model.")
    if not any(quantized_storage(module) is not None for _, module in base_modules(model)):
        raise ConfigError(
            f"model.quantize is {asked}, and the model that was handed in is dense: call lorakit.quantize on it first."
        )


def _in_body(model: PreTrainedModel, path: str) -> bool:
    return path.startswith(f"{model.base_model_prefix}.")


def _both(exclude: str | Sequence[str] | None, dense: Sequence[str]) -> list[str]:
    if isinstance(exclude, str):
        raise ConfigError(
            f"With LoftQ and a new {dense[0]}, which stays dense, adapter.exclude must be a list of names."
        )
    return [*(exclude or ()), *dense]
