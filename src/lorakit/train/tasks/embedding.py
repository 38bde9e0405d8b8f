"""Learning vectors of texts: like texts near each other, by the cosine.

Two losses. With pairs that belong together, each text must find its partner among all partners of its batch
(in-batch negatives: cross-entropy over scaled cosines; Henderson et al. 2017, arXiv 1705.00652). With pairs that have a
score, the cosine must be the score (squared error).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, DataError
from lorakit.models import ResolvedModel
from lorakit.train.collate import Collator, text_batch
from lorakit.train.columns import column_number, column_text, column_value
from lorakit.train.correlation import pearson, spearman
from lorakit.train.cutting import Overlong, PlainText, cut_texts
from lorakit.train.loss import Objective, mean_of
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe
from lorakit.train.results import Answer, EvalResult
from lorakit.train.row_set import Row, RowSet
from lorakit.train.sources import source_rows
from lorakit.train.split import Split, source_of
from lorakit.train.strands import Strand
from lorakit.train.task import Task, check_length, telling
from lorakit.train.task_data import PairData
from lorakit.train.task_sections import EmbeddingSection
from lorakit.train.text_vectors import TextRow, embed, in_batch_negatives, vectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredPair:
    """One row of a table.

    Attributes:
        place: File and line.
        first: A text.
        partner: The text that it goes with.
        score: How alike they are, from 0 to 1; None where they simply belong together.
    """

    place: str
    first: str
    partner: str
    score: float | None = None


@dataclass(frozen=True)
class PairRow:
    """A pair of texts as the model sees it.

    Attributes:
        id: Its place.
        first: Token ids of the first text.
        partner: Token ids of its partner.
        score: How alike they are, from 0 to 1; None where they simply belong together.
    """

    id: str
    first: tuple[int, ...]
    partner: tuple[int, ...]
    score: float | None

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.first) + len(self.partner)

    @property
    def texts(self) -> Sequence[Row]:
        """Both."""
        return (TextRow(self.id, self.first), TextRow(self.id, self.partner))

    @property
    def written(self) -> int:
        """None."""
        return 0

    @property
    def content(self) -> Any:
        """Ids and score."""
        return [self.first, self.partner, self.score]


@dataclass(frozen=True, kw_only=True)
class PairSet(RowSet[PairRow]):
    """All pairs of a split, and what was done about long ones."""

    @property
    def taught(self) -> str:
        """What is known of them."""
        scores = [row.score for row in self.rows if row.score is not None]
        return (
            f"pairs with scores around {sum(scores) / len(scores):.2f}"
            if scores
            else "pairs that belong together"
        )


@dataclass(frozen=True)
class PairCollator:
    """The first texts of all pairs and then their partners, side by side: the model runs once."""

    pad: int
    padded: ClassVar[bool] = True

    def __call__(self, rows: Sequence[PairRow]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(2 rows, longest)``.

        Where there are scores, ``scores`` ``(rows,)``; else ``negative`` ``(rows, rows)``: whether the partner of a
        column is a wrong one for the text of a row, which it is not where either text of the two pairs is the same.
        """
        batch = text_batch([*(row.first for row in rows), *(row.partner for row in rows)], self.pad)
        scores = [row.score for row in rows if row.score is not None]
        if scores:
            return {**batch, "scores": torch.tensor(scores)}
        negative = [[a.first != b.first and a.partner != b.partner for b in rows] for a in rows]
        return {**batch, "negative": torch.tensor(negative)}


def count_pairs(batch: Mapping[str, Tensor]) -> int:
    """How many pairs a batch has."""
    return len(batch["input_ids"]) // 2


class Embedding(Task):
    """A model without a head that learns vectors of texts."""

    model_kind = "feature-extraction"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        settings = self.settings
        data = recipe.data
        assert isinstance(data, PairData)
        self.data = data
        cosine = settings.loss == "cosine" or (settings.loss == "auto" and data.score is not None)
        if cosine and data.score is None:
            raise ConfigError(
                "embedding.loss: cosine learns the scores of pairs: name their column in data.score."
            )
        if not cosine and data.score is not None:
            raise ConfigError(
                "embedding.loss: in_batch_negatives takes all pairs for partners and would ignore data.score: leave it "
                "out, and choose the pairs that belong together with data.where."
            )

        def each(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            first, partner = vectors(model, batch, settings.pooling).chunk(2)
            if cosine:
                return ((first * partner).sum(1) - batch["scores"]).square()
            return in_batch_negatives(first, partner, batch["negative"], settings.scale, settings.symmetric)

        def summed(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
            return each(model, batch).sum()

        self.objective = Objective(summed, count_pairs, "pair", joint=not cosine)

    @property
    def settings(self) -> EmbeddingSection:
        """What the recipe says about it."""
        return self.recipe.embedding or EmbeddingSection()

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """A model without a head."""
        model = super().load(resolved)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # BERT's, behind the tokens' states: nothing here reads what it makes
        return model

    def _pairs(self, split: Split) -> list[ScoredPair]:
        data = self.data
        found: list[ScoredPair] = []
        most = data.max_rows.get(split)
        for place, row in source_rows(source_of(data, split), data.format):
            if any(
                str(column_value(row, column, "where", place)) != str(value)
                for column, value in data.where.items()
            ):
                continue
            if len(found) == most:
                break
            score = None
            if data.score is not None:
                value = column_number(row, data.score, "score", place)
                if not data.lowest <= value <= data.highest:
                    raise DataError(
                        f"{place}: the score {value:g} is not between {data.lowest:g} and {data.highest:g}: set "
                        "data.lowest and data.highest to the ends of its scale."
                    )
                score = (value - data.lowest) / (data.highest - data.lowest)
            found.append(
                ScoredPair(
                    str(place),
                    column_text(row, data.text, "text", place),
                    column_text(row, data.second_text, "second_text", place),
                    score,
                )
            )
        if not found:
            raise DataError(f"No row of the {split} split has the values that data.where asks for.")
        return found

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> PairSet:
        """Pairs of texts."""
        settings = self.recipe.train
        overlong = settings.overlong if split == "train" else "truncate"
        return pair_rows(self._pairs(split), tokenizer, max_length=settings.max_length, overlong=overlong)

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """Each text for itself."""
        pairs = (row for row in rows if isinstance(row, PairRow))
        check_length(model, max(max(len(row.first), len(row.partner)) for row in pairs), "A text")

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right."""
        return PairCollator(int(tokenizer.pad_token_id)), None

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Sequence[Strand]:
        """The two texts."""
        alike = "" if row.score is None else f"score {row.score:g}"
        pair = (("first", row.first), ("partner", row.partner))
        return [Strand(ids, (False,) * len(ids), name=name, note=alike) for name, ids in pair]

    def info(self) -> Mapping[str, Any]:
        """How texts become vectors; the task in PEFT's word for it."""
        return {
            "task": "embedding",
            "pooling": self.settings.pooling,
            "peft": {"task_type": "FEATURE_EXTRACTION"},
        }

    def measure(self, model: PreTrainedModel, rows: Sequence[PairRow], collator: Any) -> dict[str, float]:
        """The loss; with in-batch negatives it depends on what stands together in a batch."""
        return {"valid_loss": mean_of(self.objective, model, rows, collator, self.recipe.train)}

    def examples(self, split: Split, limit: int | None) -> list[ScoredPair]:
        """Pairs of texts."""
        asked = self.recipe.evaluate.metrics or ()
        scored = [m for m in asked if (m in ("pearson", "spearman")) != (self.data.score is not None)]
        if scored:
            needs = "has" if self.data.score is not None else "needs"
            raise ConfigError(
                f"evaluate.metrics: {scored[0]} is for data {'without' if needs == 'has' else 'with'} scores "
                f"(data.score)."
            )
        return self._pairs(split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[ScoredPair],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """With scores ``pearson`` and ``spearman`` of the cosines; else how well partners are found.

        A text looks for its partner among all partners of the split, each counted once: ``recall_at_1`` and
        ``recall_at_10`` are the shares of texts whose partner is the nearest, or among the ten nearest; ``mrr`` is the
        mean of one over its place.
        """
        settings = self.recipe.train
        partners = list(dict.fromkeys(pair.partner for pair in examples))
        found = embed(
            model,
            tokenizer,
            [*(pair.first for pair in examples), *partners],
            pooling=self.settings.pooling,
            max_length=settings.max_length,
            batch_rows=settings.batch_rows or 16,
            told=telling(progress, "reading"),
        )
        first, second = found[: len(examples)], found[len(examples) :]
        number = {text: i for i, text in enumerate(partners)}
        own = torch.tensor([number[pair.partner] for pair in examples])
        cosines = first @ second.T
        mine = cosines[torch.arange(len(own)), own]
        if self.data.score is not None:
            gold = [cast("float", pair.score) for pair in examples]
            every = {"pearson": pearson(mine.tolist(), gold), "spearman": spearman(mine.tolist(), gold)}
            answers = [
                Answer(p.place, f"{p.first}\n{p.partner}", f"{cosine:.3f}", (f"{p.score:.3f}",))
                for p, cosine in zip(examples, mine.tolist(), strict=True)
            ]
        else:
            # Among equally near ones the partner comes last: a model that finds all alike has found nothing.
            place = (cosines >= mine[:, None]).sum(1)
            every = {
                "recall_at_1": (place <= 1).float().mean().item(),
                "recall_at_10": (place <= 10).float().mean().item(),
                "mrr": (1 / place).mean().item(),
            }
            nearest = cosines.argmax(1).tolist()
            answers = [
                Answer(p.place, p.first, partners[n], (p.partner,), partners[n] == p.partner)
                for p, n in zip(examples, nearest, strict=True)
            ]
        scores = {metric: every[metric] for metric in self.recipe.evaluate.metrics or every}
        return EvalResult(scores, len(examples), 0.0, tuple(answers))


def pair_rows(
    pairs: Sequence[ScoredPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong,
) -> PairSet:
    """Pairs of token ids; a pair is left out where one of its texts is.

    Raises:
        DataError: A text is too long, or no pair is left.
    """
    both = [
        cut_texts(
            [PlainText(pair.place, text, None) for pair, text in zip(pairs, texts, strict=True)],
            tokenizer,
            max_length=max_length,
            overlong=overlong,
        )
        for texts in ([pair.first for pair in pairs], [pair.partner for pair in pairs])
    ]
    first, partner = ({text.place: encoded.ids for text, encoded in cut.kept} for cut in both)
    rows = tuple(
        PairRow(pair.place, first[pair.place], partner[pair.place], pair.score)
        for pair in pairs
        if pair.place in first and pair.place in partner
    )
    if not rows:
        raise DataError(f"No pair is left: of all {len(pairs)} a text is longer than train.max_length.")
    return PairSet(
        rows=rows,
        longest=max(cut.longest for cut in both),
        truncated=sum(cut.truncated for cut in both),
        dropped=len(pairs) - len(rows),
    )
