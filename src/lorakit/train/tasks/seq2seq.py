"""Learning to write one text from another with an encoder and a decoder, as T5 and BART do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.models.encoding import encode_ids
from lorakit.train.collate import Collator, PaddedCollator
from lorakit.train.cutting import Overlong, check_cut
from lorakit.train.examples import Example
from lorakit.train.generation import generate_from_sources
from lorakit.train.loss import Objective, count_labelled, mean_of
from lorakit.train.pairs import TextPair, load_pairs
from lorakit.train.progress import Progress
from lorakit.train.recipe import Metric
from lorakit.train.render import IGNORED
from lorakit.train.results import Answer, EvalResult
from lorakit.train.row_set import Row, RowSet
from lorakit.train.scores import text_scores
from lorakit.train.split import Split
from lorakit.train.strands import Strand
from lorakit.train.task import Task, check_length, telling
from lorakit.train.text_vectors import TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seq2SeqRow:
    """One row as the model sees it.

    Attributes:
        id: The example's.
        ids: Tokens that the encoder reads.
        labels: Tokens that the decoder learns to write, the last of which ends the text.
    """

    id: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens on both sides."""
        return len(self.ids) + len(self.labels)

    @property
    def texts(self) -> Sequence[Row]:
        """What the encoder reads."""
        return (TextRow(self.id, self.ids),)

    @property
    def written(self) -> int:
        """The decoder's tokens."""
        return len(self.labels)

    @property
    def content(self) -> Any:
        """Both sides."""
        return [self.ids, self.labels]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSet(RowSet[Seq2SeqRow]):
    """All rows of a split, and what was done about long ones."""

    @property
    def learnt(self) -> int:
        """Tokens to write."""
        return sum(len(row.labels) for row in self.rows)

    @property
    def taught(self) -> str:
        """How much is written."""
        return f"{self.learnt / len(self.rows):.0f} of them to write"


def written_logits(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(n, vocabulary)`` of each written token in float32, the tokens ``(n,)``, their rows' numbers ``(n,)``.

    The decoder reads what it should have written, one place to the right.
    """
    labels = batch["labels"]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=base.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).logits
    learnt = labels != IGNORED
    return logits[learnt].float(), labels[learnt], learnt.nonzero()[:, 0]


def written_losses(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """``-log p`` of each written token of a batch, and the number of its row, both ``(n,)``."""
    logits, labels, rows = written_logits(model, base, batch)
    return F.cross_entropy(logits, labels, reduction="none"), rows


def summed_written_loss(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of ``-log p`` over the written tokens of a batch; a scalar."""
    logits, labels, _ = written_logits(model, base, batch)
    return F.cross_entropy(logits, labels, reduction="sum")


def read_both(batch: Mapping[str, Tensor]) -> int:
    """Tokens on both sides of a batch, without padding."""
    return int(batch["attention_mask"].sum()) + count_labelled(batch)


WRITTEN = Objective(summed_written_loss, count_labelled, "token", written_losses, read_both)


class Seq2Seq(Task):
    """An encoder and a decoder that learn to write the answer to a text."""

    objective = WRITTEN
    model_kind = "seq2seq"

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> Seq2SeqSet:
        """Texts with what is to be written."""
        settings = self.recipe.train
        examples = load_pairs(self.recipe.data, split, learning=True)
        return seq2seq_rows(examples, tokenizer, max_length=settings.max_length, overlong=settings.overlong)

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """Each side for itself."""
        check_length(model, max(len(row.ids) for row in rows), "A source")  # type: ignore[attr-defined]
        check_length(model, max(len(row.labels) for row in rows), "A target")  # type: ignore[attr-defined]

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right, both sides."""
        return PaddedCollator(int(tokenizer.pad_token_id)), None

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Sequence[Strand]:
        """What is read, and what is written."""
        read = Strand(row.ids, (False,) * len(row.ids), name="source")
        return [read, Strand(row.labels, (True,) * len(row.labels), name="target")]

    def info(self) -> Mapping[str, Any]:
        """The task in PEFT's word for it."""
        return {"task": "seq2seq", "peft": {"task_type": "SEQ_2_SEQ_LM"}}

    def measure(self, model: PreTrainedModel, rows: Sequence[Seq2SeqRow], collator: Any) -> dict[str, float]:
        """The loss."""
        return {"valid_loss": mean_of(self.objective, model, rows, collator, self.recipe.train)}

    def examples(self, split: Split, limit: int | None) -> list[TextPair]:
        """Texts with what would be right to write."""
        return load_pairs(self.recipe.data, split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TextPair],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """Texts are written, greedily or by beam search, and compared; or the loss of the right ones is taken."""
        recipe = self.recipe
        several = any(len(example.references) > 1 for example in examples)
        default: list[Metric] = ["bleu", "nist"] if several else ["exact_match", "bleu"]
        metrics = recipe.evaluate.metrics or default
        scores: dict[str, float] = {}
        answers: list[Answer] = []
        if any(metric != "loss" for metric in metrics):
            sources = [example.source for example in examples]
            texts = generate_from_sources(
                model, tokenizer, sources, recipe.generate, recipe.train.max_length, telling(progress, title)
            )
            asked = [
                Example(e.id, ({"role": "user", "content": e.source},), e.target, e.references)
                for e in examples
            ]
            scores, answers = text_scores(metrics, texts, asked)
        if "loss" in metrics:
            settings = recipe.train
            rows = seq2seq_rows(
                examples, tokenizer, max_length=settings.max_length, overlong=settings.overlong
            )
            collator = PaddedCollator(int(tokenizer.pad_token_id))
            scores["loss"] = mean_of(
                self.objective, model, rows.rows, collator, settings, telling(progress, "loss")
            )
            scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
        return EvalResult(scores, len(examples), 0.0, tuple(answers))


def seq2seq_rows(
    examples: Sequence[TextPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong,
) -> Seq2SeqSet:
    """Rows of token ids for both sides.

    Args:
        examples: At least one.
        tokenizer: The model's.
        max_length: Most tokens of each side.
        overlong: What to do where a side is longer: leave the row out, cut its end off, or stop.

    Raises:
        DataError: A row is too long, or none is left.
    """
    end = tokenizer.eos_token_id
    rows, cut, longest = [], [], 0
    sources = encode_ids(tokenizer, [example.source for example in examples])
    targets = encode_ids(tokenizer, [example.target for example in examples], target=True)
    for example, ids, labels in zip(examples, sources, targets, strict=True):
        if end is not None and labels[-1:] != [end]:
            labels.append(end)
        length = max(len(ids), len(labels))
        longest = max(longest, length)
        if length > max_length:
            cut.append(example.place)
            if overlong == "drop":
                continue
            # The source keeps the token that ends it, which encoders look for; a cut target has no end.
            del ids[max_length - 1 : -1]
            del labels[max_length:]
        rows.append(Seq2SeqRow(example.id, tuple(ids), tuple(labels)))
    truncated, dropped = check_cut(cut, len(rows), len(examples), longest, max_length, overlong)
    return Seq2SeqSet(rows=tuple(rows), longest=longest, truncated=truncated, dropped=dropped)
