"""Learning which of two answers is better: direct preference optimization (DPO).

``loss = -log sigmoid(beta ((c - c0) - (r - r0)))``, where ``c`` and ``r`` are the log-probabilities of the chosen and
the rejected answer under the adapter and ``c0``, ``r0`` those under the reference. The reference is the base, which
is the same model with the adapter off: there is no second model, and because the base never changes its numbers are
computed once. Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing: Mitchell 2023 (cDPO).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.attach import use
from lorakit.attach.attachments import kept_by
from lorakit.train.collate import Collator
from lorakit.train.cutting import Overlong, check_cut
from lorakit.train.loss import Objective, token_losses, without
from lorakit.train.pairs import Preference as PreferencePair
from lorakit.train.pairs import load_preferences
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe
from lorakit.train.render import Rendered, Renderer
from lorakit.train.results import Answer, EvalResult
from lorakit.train.row_set import Row, RowSet
from lorakit.train.scoring import outputs
from lorakit.train.split import Split
from lorakit.train.strands import Strand, conversation_strand
from lorakit.train.task import check_length, telling
from lorakit.train.task_sections import PreferenceSection
from lorakit.train.tasks.causal_lm import DecoderTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REFERENCE = "reference"


@dataclass(frozen=True)
class PreferenceRow:
    """A conversation with two answers, as the model sees it.

    Attributes:
        id: The pair's.
        chosen: With the better answer.
        rejected: With the worse one.
        reference: The base's log-probabilities of the chosen and of the rejected answer, once they are known.
    """

    id: str
    chosen: Rendered
    rejected: Rendered
    reference: tuple[float, float] | None = None

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def texts(self) -> Sequence[Row]:
        """Both."""
        return (self.chosen, self.rejected)

    @property
    def written(self) -> int:
        """None."""
        return 0

    @property
    def content(self) -> Any:
        """Ids and labels of both."""
        return [self.chosen.content, self.rejected.content]


@dataclass(frozen=True, kw_only=True)
class PreferenceSet(RowSet[PreferenceRow]):
    """All pairs of a split, and what was done about long ones."""

    @property
    def taught(self) -> str:
        """How many tokens decide."""
        learnt = sum(row.chosen.learnt + row.rejected.learnt for row in self.rows)
        return f"pairs of answers, {100 * learnt / self.tokens:.0f} % of the tokens are theirs"


@dataclass(frozen=True)
class PreferenceCollator:
    """All chosen conversations and then all rejected ones as one batch of another collator: the model runs once.

    Attributes:
        inner: Packs or pads.
    """

    inner: Collator

    @property
    def padded(self) -> bool:
        """As the inner one."""
        return self.inner.padded

    def __call__(self, rows: Sequence[PreferenceRow]) -> dict[str, Tensor]:
        """The inner batch of twice the rows, and ``reference`` ``(rows, 2)`` where it is known."""
        batch = self.inner([*(row.chosen for row in rows), *(row.rejected for row in rows)])
        known = [row.reference for row in rows if row.reference is not None]
        return {**batch, _REFERENCE: torch.tensor(known, dtype=torch.float64)} if known else batch


def answer_log_probabilities(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities ``(pairs, 2)`` of the chosen and rejected answers of a batch, summed over their tokens."""
    losses, rows = token_losses(model, base, without(batch, _REFERENCE))
    twice = len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else batch["input_ids"].shape[0]
    return -losses.new_zeros(twice).index_add(0, rows, losses).view(2, -1).T


def log_ratios(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """How much likelier the adapter makes each answer than the base does, ``(pairs, 2)``, in nats."""
    logps = answer_log_probabilities(model, base, batch)
    return logps - batch[_REFERENCE].to(logps)


def dpo_losses(ratios: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair ``(pairs,)``.

    Args:
        ratios: Log-ratios ``(pairs, 2)`` of adapter to reference, of the chosen and the rejected answer.
        beta: The temperature.
        label_smoothing: The share of pairs that are taken to be the wrong way round.
    """
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    losses = -F.logsigmoid(margin) * (1 - label_smoothing)
    return losses - F.logsigmoid(-margin) * label_smoothing if label_smoothing else losses


def count_pairs(batch: Mapping[str, Tensor]) -> int:
    """How many pairs a batch has."""
    return len(batch[_REFERENCE])


class Preference(DecoderTask):
    """A decoder that learns to prefer one answer to another; the base is the reference."""

    measures = ("valid_loss", "valid_reward_accuracy", "valid_reward_margin")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        settings = self.settings

        def summed(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
            ratios = log_ratios(model, base, batch)
            return dpo_losses(ratios, settings.beta, settings.label_smoothing).sum()

        self.objective = Objective(summed, count_pairs, "pair")

    @property
    def settings(self) -> PreferenceSection:
        """What the recipe says about it."""
        return self.recipe.preference or PreferenceSection()

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> PreferenceSet:
        """Conversations with two answers, rendered."""
        settings = self.recipe.train
        pairs = load_preferences(self.recipe.data, split)
        return preference_rows(pairs, tokenizer, max_length=settings.max_length, overlong=settings.overlong)

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """Each conversation for itself."""
        both = (row for row in rows if isinstance(row, PreferenceRow))
        check_length(model, max(max(len(row.chosen.ids), len(row.rejected.ids)) for row in both))

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Packed or padded, as for `causal-lm`."""
        inner, reason = super().collator(model, tokenizer)
        return PreferenceCollator(inner), reason

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Sequence[Strand]:
        """The conversation with the better answer, and with the worse one."""
        return [
            conversation_strand(tokenizer, row.chosen, "chosen"),
            conversation_strand(tokenizer, row.rejected, "rejected"),
        ]

    def prepared(
        self, model: PreTrainedModel, rows: Sequence[PreferenceRow], collator: Collator
    ) -> list[PreferenceRow]:
        """The rows with the base's log-probabilities, which training never changes."""
        return with_reference(model, rows, collator, self.recipe.train)

    def info(self) -> Mapping[str, Any]:
        """The task; what comes out is an adapter for a decoder like any other."""
        return {"task": "dpo", "beta": self.settings.beta, "peft": {"task_type": "CAUSAL_LM"}}

    def measure(
        self, model: PreTrainedModel, rows: Sequence[PreferenceRow], collator: Any
    ) -> dict[str, float]:
        """The loss, and what is told about rewards."""
        ratios = self._ratios(model, rows, collator)
        losses = dpo_losses(ratios, self.settings.beta, self.settings.label_smoothing)
        return {"valid_loss": losses.mean().item(), **self._rewards(ratios, "valid_")}

    def _rewards(self, ratios: Tensor, prefix: str = "") -> dict[str, float]:
        margins = self.settings.beta * (ratios[:, 0] - ratios[:, 1])
        return {
            f"{prefix}reward_accuracy": (margins > 0).float().mean().item(),
            f"{prefix}reward_margin": margins.mean().item(),
        }

    def _ratios(
        self, model: PreTrainedModel, rows: Sequence[PreferenceRow], collator: Collator, told: Any = None
    ) -> Tensor:
        def ratios(batch: Mapping[str, Tensor]) -> Tensor:
            return log_ratios(model, model, batch).float()

        return outputs(model, rows, collator, self.recipe.train, ratios, told)

    def examples(self, split: Split, limit: int | None) -> list[Any]:
        """Prompts with two answers."""
        return load_preferences(self.recipe.data, split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """``reward_accuracy`` from 0 to 1, ``reward_margin`` and ``loss`` in nats; of the base 0, 0 and log 2."""
        settings = self.recipe.train
        rows = preference_rows(
            examples, tokenizer, max_length=settings.max_length, overlong=settings.overlong
        )
        progress.say(str(rows))
        collator, _ = self.collator(model, tokenizer)
        ready = with_reference(model, rows.rows, collator, settings)
        ratios = self._ratios(model, ready, collator, telling(progress, "comparing"))
        losses = dpo_losses(ratios, self.settings.beta, self.settings.label_smoothing)
        every = {**self._rewards(ratios), "loss": losses.mean().item()}
        right = dict(zip((row.id for row in ready), (ratios[:, 0] > ratios[:, 1]).tolist(), strict=True))
        answers = tuple(
            Answer(
                e.id,
                e.messages[-1]["content"],
                e.chosen if right[e.id] else e.rejected,
                (e.chosen,),
                right[e.id],
            )
            for e in examples
            if e.id in right
        )
        return EvalResult(
            {m: every[m] for m in self.recipe.evaluate.metrics or every}, len(examples), 0.0, answers
        )


def with_reference(
    model: PreTrainedModel, rows: Sequence[PreferenceRow], collator: Collator, settings: Any
) -> list[PreferenceRow]:
    """Rows with the log-probabilities of the base, whatever adapters are on it.

    Args:
        model: With or without adapters.
        rows: Pairs.
        collator: Makes their batches.
        settings: The recipe's ``train``, for the size of the batches.
    """

    def of_base(batch: Mapping[str, Tensor]) -> Tensor:
        return answer_log_probabilities(model, model, batch).double()

    plain = [replace(row, reference=None) for row in rows]
    with use(model, None) if kept_by(model) is not None else nullcontext():
        found = outputs(model, plain, collator, settings, of_base).tolist()
    return [
        replace(row, reference=(chosen, rejected))
        for row, (chosen, rejected) in zip(plain, found, strict=True)
    ]


def preference_rows(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong,
) -> PreferenceSet:
    """Pairs of rendered conversations.

    Args:
        pairs: At least one.
        tokenizer: The model's.
        max_length: Most tokens of each conversation.
        overlong: What to do where one is longer: leave the pair out, cut the ends off, or stop.

    Raises:
        DataError: A row cannot be rendered, is too long, or none is left.
    """
    renderer = Renderer(tokenizer)
    rows, cut, longest = [], [], 0
    answers = renderer.rows([example for pair in pairs for example in pair.examples])
    for pair, chosen, rejected in zip(pairs, answers, answers, strict=True):
        length = max(len(chosen.ids), len(rejected.ids))
        longest = max(longest, length)
        if length > max_length:
            cut.append(pair.place)
            chosen, rejected = _cut(chosen, max_length), _cut(rejected, max_length)
            # Where the cut leaves nothing of an answer there is nothing to compare.
            if overlong == "drop" or not (chosen.learnt and rejected.learnt):
                continue
        rows.append(PreferenceRow(pair.id, chosen, rejected))
    check_cut(cut, len(rows), len(pairs), longest, max_length, overlong)
    dropped = len(pairs) - len(rows)
    return PreferenceSet(rows=tuple(rows), longest=longest, truncated=len(cut) - dropped, dropped=dropped)


def _cut(row: Rendered, length: int) -> Rendered:
    return replace(row, ids=row.ids[:length], labels=row.labels[:length])
