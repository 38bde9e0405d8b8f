"""Scoring a base model or an adapter on the examples of a recipe."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.models import load_model, load_tokenizer, resolve
from lorakit.train.classifier_scores import LabelScore
from lorakit.train.collate import choose_collator
from lorakit.train.data import Split, load_examples
from lorakit.train.data_sections import FileData
from lorakit.train.examples import Example
from lorakit.train.generation import generate
from lorakit.train.loss import mean_loss
from lorakit.train.progress import Progress, Silent
from lorakit.train.quantized_base import quantize_base
from lorakit.train.recipe import Metric, Recipe
from lorakit.train.render import render
from lorakit.train.scores import bleu, exact_match, judge_sql, nist
from lorakit.train.scoring import scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """One answer and what became of it.

    Attributes:
        id: The example's.
        prompt: What the user asked.
        answer: What the model wrote.
        references: What would have been right.
        correct: Whether it counts as right, where the metric says so for single answers.
        error: Why a query did not run.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    correct: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class EvalResult:
    """Scores of one model on one split.

    Attributes:
        scores: Metric to value: ``execution_accuracy``, ``failed_to_run`` (the share of queries that SQLite refuses)
            and ``exact_match`` from 0 to 1, ``bleu`` from 0 to 100, ``nist`` and ``nist_row_lengths`` (see
            `lorakit.train.scores.nist`), ``loss`` in nats a token and ``perplexity``. Of a classifier ``accuracy`` and
            ``macro_f1`` from 0 to 1, and ``loss`` in nats a row.
        count: Examples scored.
        seconds: Spent, without loading.
        answers: What was written, if anything had to be; of a classifier the label that each text was given.
        labels: Of a classifier, how each label fared.
    """

    scores: dict[str, float]
    count: int
    seconds: float
    answers: tuple[Answer, ...] = ()
    labels: tuple[LabelScore, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it, without the answers."""
        plain = {"scores": self.scores, "count": self.count, "seconds": round(self.seconds, 3)}
        if self.labels:
            plain["labels"] = [
                {**dataclasses.asdict(s), "precision": s.precision, "recall": s.recall, "f1": s.f1}
                for s in self.labels
            ]
        return plain


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
        recipe: Names the data, the metrics and how answers are written.
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
    if recipe.task == "classification":
        from lorakit.train.classifying import evaluate_classifier

        return evaluate_classifier(recipe, adapter, split, limit, model, tokenizer, progress)
    examples = load_examples(recipe.data, split)
    examples = examples[: limit or recipe.evaluate.limit]
    metrics = recipe.evaluate.metrics or default_metrics(recipe, examples)
    resolved = resolve(recipe.model.name) if model is None or tokenizer is None else None
    tokenizer = tokenizer or load_tokenizer(resolved or recipe.model.name, revision=recipe.model.revision)
    own = model is None
    if model is None:
        section = recipe.model
        model = load_model(
            resolved or section.name, dtype=section.dtype, device=section.device, revision=section.revision
        )
        quantize_base(model, recipe)
    with scored(model, adapter, own=own):
        began = time.perf_counter()
        result = _score(recipe, examples, metrics, model, tokenizer, progress, title)
        return EvalResult(result.scores, len(examples), time.perf_counter() - began, result.answers)


def default_metrics(recipe: Recipe, examples: Sequence[Example]) -> list[Metric]:
    """What fits the data: queries are run, texts with several references are compared, conversations cost a loss."""
    if all(example.case is not None for example in examples):
        return ["execution_accuracy", "exact_match"]
    if any(len(example.references) > 1 for example in examples):
        return ["bleu", "nist"]
    if isinstance(recipe.data, FileData) and any(example.learn_all for example in examples):
        return ["loss"]
    return ["exact_match", "bleu"]


def _score(
    recipe: Recipe,
    examples: Sequence[Example],
    metrics: Sequence[Metric],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    title: str,
) -> EvalResult:
    scores: dict[str, float] = {}
    answers: list[Answer] = []
    if "execution_accuracy" in metrics and any(example.case is None for example in examples):
        raise ConfigError("execution_accuracy needs databases: set data.databases, or use a built-in task.")
    if any(metric != "loss" for metric in metrics):
        texts = generate(
            model,
            tokenizer,
            [example.messages for example in examples],
            recipe.generate,
            told=lambda done, total: progress.answered(done, total, title),
        )
        answers = [
            Answer(e.id, e.messages[-1]["content"], text, e.references)
            for e, text in zip(examples, texts, strict=True)
        ]
        scores, answers = _judge(metrics, texts, examples, answers)
    if "loss" in metrics:
        rows = render(
            examples, tokenizer, max_length=recipe.train.max_length, overlong=recipe.train.overlong
        ).rows
        collator, _ = choose_collator(recipe.train.batching, model, tokenizer)
        scores["loss"] = mean_loss(
            model, rows, collator, recipe.train, lambda done, total: progress.answered(done, total, "loss")
        )
        scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
    return EvalResult(scores, len(examples), 0.0, tuple(answers))


def _judge(
    metrics: Sequence[Metric], texts: Sequence[str], examples: Sequence[Example], answers: list[Answer]
) -> tuple[dict[str, float], list[Answer]]:
    references = [example.references for example in examples]
    scores: dict[str, float] = {}
    if "execution_accuracy" in metrics:
        report = judge_sql(texts, examples)
        scores["execution_accuracy"] = report.accuracy
        scores["failed_to_run"] = report.failed / len(texts)
        answers = [
            Answer(a.id, a.prompt, a.answer, a.references, verdict.correct, verdict.error)
            for a, verdict in zip(answers, report.verdicts, strict=True)
        ]
    if "exact_match" in metrics:
        scores["exact_match"] = exact_match(texts, references)
    if "bleu" in metrics:
        scores["bleu"] = bleu(texts, references)
    if "nist" in metrics:
        scores["nist"] = nist(texts, references)
        scores["nist_row_lengths"] = nist(texts, references, mean_length="row")
    return scores, answers
