"""The tasks that a recipe can name, one a file. Each is a `lorakit.train.task.Task`, all that the loop knows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lorakit.train.recipe import Recipe, TaskName

if TYPE_CHECKING:
    from lorakit.train.task import Task

_CLASSES: dict[TaskName, tuple[str, str]] = {
    "causal-lm": ("causal_lm", "CausalLm"),
    "seq2seq": ("seq2seq", "Seq2Seq"),
    "classification": ("classification", "Classification"),
    "regression": ("regression", "Regression"),
    "token-classification": ("token_classification", "TokenClassification"),
    "embedding": ("embedding", "Embedding"),
    "dpo": ("preference", "Preference"),
    "image-classification": ("image_classification", "ImageClassification"),
}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe; its module is imported now."""
    if recipe.adapters is not None:
        from lorakit.train.tasks.several import Several

        return Several(recipe)
    module, name = _CLASSES[recipe.task]
    made: Task = getattr(import_module(f"{__name__}.{module}"), name)(recipe)
    return made
