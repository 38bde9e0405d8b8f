"""Scoring a base model or an adapter on the examples of a recipe."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.models.chat_template import adopt_template
from lorakit.train.data import Split
from lorakit.train.progress import Progress, Silent
from lorakit.train.quantized_base import quantize_base
from lorakit.train.recipe import Recipe
from lorakit.train.results import Answer, EvalResult
from lorakit.train.scoring import scored
from lorakit.train.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "EvalResult", "evaluate"]


def evaluate(
    recipe: Recipe,
    *,
    adapter: str | Path | None = None,
    split: Split = "test",
    limit: int | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    title: str = "answering",
) -> EvalResult:
    """Score a model on the examples of a recipe.

    Args:
        recipe: Names the data, the metrics and how answers are written. One with several adapters is scored part by
            part, see `Recipe.parts`.
        adapter: Folder of the adapter to score; without one the base model is scored, or ``model`` as it is.
        split: ``train``, ``valid`` or ``test``.
        limit: Score only so many of the first examples; by default what the recipe says.
        model: A model that is loaded already, scored with whatever adapters act (see `lorakit.use`).
        tokenizer: Its tokenizer.
        progress: Whom to tell.
        title: What to call the answering there.

    Raises:
        ConfigError: A metric needs what the data has not.
        DataError: A data file is missing, empty or malformed.
        AdapterFileError: The adapter cannot be read, or belongs to another model.
    """
    progress = progress or Silent()
    task = task_of(recipe)
    examples = task.examples(split, limit or recipe.evaluate.limit)
    resolved = task.resolve() if model is None else recipe.model.name
    if tokenizer is None:
        tokenizer = task.tokenizer(resolved)
        if adapter is not None and tokenizer is not None and adopt_template(adapter, tokenizer):
            progress.say("prompts are rendered by the adapter's own chat template")
    own = model is None
    if model is None:
        model = task.load_trained(resolved, adapter)
        quantize_base(model, recipe, task.head)
    with scored(model, adapter, own=own):
        began = time.perf_counter()
        result = task.score(model, tokenizer, examples, progress, title)
        return dataclasses.replace(result, count=len(examples), seconds=time.perf_counter() - began)
