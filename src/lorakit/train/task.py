"""What a run is for: which rows, which model, what is minimised and scored. The loop is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.attach import AttachReport
from lorakit.core import Method
from lorakit.errors import ConfigError
from lorakit.models import ResolvedModel, load_model, load_tokenizer, resolve
from lorakit.models import Task as ModelTask
from lorakit.models.chat_template import read_template
from lorakit.train.batches import plan_run
from lorakit.train.collate import Collator
from lorakit.train.data import Split, has_split
from lorakit.train.loss import Objective
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe, Targets
from lorakit.train.results import EvalResult
from lorakit.train.row_set import Row, RowSet
from lorakit.train.strands import Strand, token_strand

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Attachable = tuple[Method | Mapping[Any, Method], Targets | None]
"""What `lorakit.attach` is given."""


class Task(ABC):
    """What differs between kinds of training. One object serves one run, and is called in the order below.

    Attributes:
        objective: What is minimised; known at the latest when the model is.
        model_kind: What the base model is for, as `lorakit.models.load_model` takes it.
        measures: The names of what `measure` returns; the best adapter can be told by any of them.
        head: Paths of the modules that are trained in full whatever the adapter is; known when the model is.
        parts: The adapters of the run, each as a task with a recipe of its own; most runs have one.
    """

    objective: Objective
    model_kind: ClassVar[ModelTask] = "causal-lm"
    measures: tuple[str, ...] = ("valid_loss",)

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.head: tuple[str, ...] = ()
        self.parts: tuple[Task, ...] = (self,)

    # ---- both to train and to score
    def resolve(self) -> ResolvedModel | str:
        """Where the base model is.

        Raises:
            ModelError: Nothing has that name.
        """
        return resolve(self.recipe.model.name)

    def tokenizer(self, resolved: ResolvedModel | str) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer, with the recipe's chat template; None where nothing is text."""
        section = self.recipe.model
        tokenizer = load_tokenizer(resolved, revision=section.revision)
        if section.chat_template is not None:
            tokenizer.chat_template = read_template(section.chat_template)
        return tokenizer

    # ---- to train
    def has_split(self, split: Split) -> bool:
        """Whether there are examples of a split."""
        return has_split(self.recipe.data, split)

    @abstractmethod
    def rows(self, tokenizer: Any, split: Split) -> RowSet[Any]:
        """The rows of a split to learn from or to measure the loss on; the training split comes first."""

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """The base model."""
        section = self.recipe.model
        return load_model(
            resolved,
            task=self.model_kind,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
        )

    def accept(self, model: PreTrainedModel) -> None:  # noqa: B027 - most tasks take any model
        """Check a base model that the caller has loaded."""

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """The model must be able to read the rows.

        Raises:
            ConfigError: It cannot.
        """
        check_length(model, max(row.length for row in rows))

    @abstractmethod
    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """What makes batches, and why they are padded where that was not asked for."""

    def prepared(self, model: PreTrainedModel, rows: Sequence[Any], collator: Collator) -> Sequence[Any]:
        """The rows with what has to be measured on the base, while no adapter is on it."""
        return rows

    def batches(self, rows: Sequence[Any], padded: bool) -> list[list[int]]:
        """The batches of the whole run, as lists of row numbers."""
        return plan_run(self.recipe.train, rows, padded)

    def rows_of(self, part: Task, rows: Sequence[Any]) -> list[Any]:
        """Those of some rows that one of ``parts`` learns from."""
        return list(rows)

    def collator_of(self, part: Task, collator: Any) -> Collator:
        """What makes batches of the rows of one of ``parts`` alone."""
        made: Collator = collator
        return made

    def adapter(self, model: PreTrainedModel) -> Attachable:
        """What `lorakit.attach` is given: the recipe's adapter and its targets."""
        return self.recipe.adapter.adapter(), self.recipe.adapter.targets

    def check(self, model: PreTrainedModel, report: AttachReport) -> None:  # noqa: B027 - nor asks more of an adapter
        """Check what was attached."""

    def info(self) -> Mapping[str, Any]:
        """What the adapter's files should say about the task."""
        return {}

    def strands(self, tokenizer: Any, row: Any) -> Sequence[Strand]:
        """A row for people to look at; called for rows of tokens only."""
        return [token_strand(row)]

    def leave(self, adapter: Path, tokenizer: Any) -> None:  # noqa: B027 - most adapters are their two files
        """Write what else belongs beside a saved adapter."""

    def warning(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What the user should know before the first step."""
        return None

    @abstractmethod
    def measure(self, model: PreTrainedModel, rows: Any, collator: Any) -> dict[str, float]:
        """``valid_loss`` and whatever else is told about the valid split by the way."""

    # ---- to score
    @abstractmethod
    def examples(self, split: Split, limit: int | None) -> Sequence[Any]:
        """What is scored: the first examples of a split; read before any model is loaded."""

    def load_trained(self, resolved: ResolvedModel | str, adapter: str | Path | None) -> PreTrainedModel:
        """The base that a trained adapter goes onto, or a model to score as it is."""
        return self.load(resolved)

    @abstractmethod
    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """Scores of the adapters that act; the time is taken by the caller.

        Args:
            model: With whatever adapters act.
            tokenizer: Its tokenizer.
            examples: From `examples`.
            progress: Whom to tell.
            title: What to call the answering there.
        """


def check_length(model: PreTrainedModel, longest: int, what: str = "A row") -> None:
    """Refuse a row that is longer than what the model has positions for.

    Raises:
        ConfigError: It is.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            f"{what} has {longest} tokens, but the model reads at most {most}: set train.max_length to {most} or less."
        )


def telling(progress: Progress, what: str) -> Any:
    """A callback for `lorakit.train.scoring.run_batches` that tells how far it is."""
    return partial(_tell, progress, what)


def _tell(progress: Progress, what: str, done: int, total: int) -> None:
    progress.answered(done, total, what)
