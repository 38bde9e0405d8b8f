"""Learning to write answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.models.chat_template import save_template
from lorakit.models.conversation import stop_id
from lorakit.train.collate import Collator, choose_collator
from lorakit.train.data import Split, load_examples
from lorakit.train.data_sections import FileData
from lorakit.train.examples import Example
from lorakit.train.generation import generate
from lorakit.train.loss import NEXT_TOKEN, mean_loss
from lorakit.train.progress import Progress
from lorakit.train.recipe import Metric, Recipe
from lorakit.train.render import Rendered, RenderedSet, render
from lorakit.train.results import Answer, EvalResult
from lorakit.train.scores import text_scores
from lorakit.train.stop_token import stop_token_warning
from lorakit.train.strands import Strand, conversation_strand
from lorakit.train.task import Task, telling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DecoderTask(Task):
    """What tasks have in common that train a decoder without a head of its own."""

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Packed where the recipe asks for it, or a probe shows that it is exact."""
        methods = self.recipe.adapter.methods()
        return choose_collator(self.recipe.train.batching, model, tokenizer, methods)

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Sequence[Strand]:
        """The conversation, with who says what."""
        return [conversation_strand(tokenizer, row)]

    def leave(self, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The chat template that the adapter was trained with."""
        save_template(adapter, tokenizer)

    def warning(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Whether answers can be learnt to end."""
        return stop_token_warning(model, tokenizer, stop_id(tokenizer), self.recipe.adapter.name)


class CausalLm(DecoderTask):
    """A decoder that learns the answers of conversations."""

    objective = NEXT_TOKEN

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> RenderedSet:
        """Conversations, rendered."""
        settings = self.recipe.train
        examples = load_examples(self.recipe.data, split, learning=True)
        return render(examples, tokenizer, max_length=settings.max_length, overlong=settings.overlong)

    def measure(self, model: PreTrainedModel, rows: Sequence[Rendered], collator: Any) -> dict[str, float]:
        """The loss."""
        return {"valid_loss": mean_loss(model, rows, collator, self.recipe.train)}

    def examples(self, split: Split, limit: int | None) -> list[Example]:
        """Conversations with the answers that would be right."""
        examples = load_examples(self.recipe.data, split)[:limit]
        metrics = self.recipe.evaluate.metrics or default_metrics(self.recipe, examples)
        if "execution_accuracy" in metrics and any(example.case is None for example in examples):
            raise ConfigError(
                "execution_accuracy needs databases: set data.databases, or use a built-in task."
            )
        unasked = next((e for e in examples if not e.messages), None)
        if unasked is not None and any(metric != "loss" for metric in metrics):
            raise ConfigError(
                f"{unasked.where} is a plain text, to which there is no answer: set evaluate.metrics: [loss]."
            )
        return examples

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """Answers are written and compared, or the loss of the right ones is taken, as the metrics need."""
        recipe = self.recipe
        metrics = recipe.evaluate.metrics or default_metrics(recipe, examples)
        scores: dict[str, float] = {}
        answers: list[Answer] = []
        if any(metric != "loss" for metric in metrics):
            texts = generate(
                model,
                tokenizer,
                [example.messages for example in examples],
                recipe.generate,
                tools=[example.tools for example in examples],
                told=telling(progress, title),
            )
            scores, answers = text_scores(metrics, texts, examples)
        if "loss" in metrics:
            rows = render(
                examples, tokenizer, max_length=recipe.train.max_length, overlong=recipe.train.overlong
            ).rows
            collator, _ = choose_collator(recipe.train.batching, model, tokenizer)
            scores["loss"] = mean_loss(model, rows, collator, recipe.train, told=telling(progress, "loss"))
            scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
        return EvalResult(scores, len(examples), 0.0, tuple(answers))


def default_metrics(recipe: Recipe, examples: Sequence[Example]) -> list[Metric]:
    """What fits the data: queries are run, texts with several references are compared, conversations cost a loss."""
    if not all(example.messages for example in examples):
        return ["loss"]
    if all(example.case is not None for example in examples):
        return ["execution_accuracy", "exact_match"]
    if any(len(example.references) > 1 for example in examples):
        return ["bleu", "nist"]
    if any(example.calls or not example.messages for example in examples):
        return ["loss"]
    if isinstance(recipe.data, FileData) and any(example.learn_all for example in examples):
        return ["loss"]
    return ["exact_match", "bleu"]
