"""What a run is for: which rows, which model, what is minimised. The loop is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lorakit.attach import AttachReport
from lorakit.core import Method
from lorakit.models import ResolvedModel, load_model
from lorakit.train.collate import Collator, choose_collator
from lorakit.train.data import Split, load_examples
from lorakit.train.loss import NEXT_TOKEN, Objective, mean_loss
from lorakit.train.recipe import Recipe, Targets
from lorakit.train.render import Rendered, RenderedSet, render, stop_id
from lorakit.train.stop_token import stop_token_warning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Row(Protocol):
    """One row as the model sees it."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids."""

    @property
    def labels(self) -> tuple[int, ...]:
        """What is learnt from it."""


class RowSet(Protocol):
    """All rows of a split, and what was done about long ones; as text it tells about itself."""

    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def longest(self) -> int: ...
    @property
    def truncated(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def learnt(self) -> int: ...


class Task(ABC):
    """What differs between kinds of training. One object serves one run, and is called in the order below.

    Attributes:
        objective: What is minimised.
        head: Paths of the modules that are trained in full whatever the adapter is; known when the model is.
    """

    objective: ClassVar[Objective]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.head: tuple[str, ...] = ()

    @abstractmethod
    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> RowSet:
        """The rows of a split to learn from or to measure the loss on; the training split comes first."""

    @abstractmethod
    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """The base model."""

    def accept(self, model: PreTrainedModel) -> None:  # noqa: B027 - most tasks take any model
        """Check a base model that the caller has loaded."""

    @abstractmethod
    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """What makes batches, and why they are padded where that was not asked for."""

    @abstractmethod
    def adapter(self, model: PreTrainedModel) -> tuple[Method | Mapping[Any, Method], Targets | None]:
        """What `lorakit.attach` is given: the recipe's adapter and its targets."""

    def check(self, model: PreTrainedModel, report: AttachReport) -> None:  # noqa: B027 - nor asks more of an adapter
        """Check what was attached."""

    def info(self) -> Mapping[str, Any]:
        """What the adapter's files should say about the task."""
        return {}

    def warning(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What the user should know before the first step."""
        return None

    @abstractmethod
    def measure(self, model: PreTrainedModel, rows: Any, collator: Any) -> dict[str, float]:
        """``valid_loss`` and whatever else is told about the valid split by the way."""


class CausalLm(Task):
    """Learning to write answers."""

    objective = NEXT_TOKEN

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> RenderedSet:
        """Conversations, rendered."""
        settings = self.recipe.train
        examples = load_examples(self.recipe.data, split, learning=True)
        return render(examples, tokenizer, max_length=settings.max_length, overlong=settings.overlong)

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """A decoder."""
        section = self.recipe.model
        return load_model(resolved, dtype=section.dtype, device=section.device, revision=section.revision)

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Packed where the recipe asks for it, or a probe shows that it is exact."""
        chosen = self.recipe.adapter.adapter()
        methods = [chosen] if isinstance(chosen, Method) else chosen.values()
        return choose_collator(self.recipe.train.batching, model, tokenizer, methods)

    def adapter(self, model: PreTrainedModel) -> tuple[Method | Mapping[Any, Method], Targets | None]:
        """As it stands in the recipe."""
        return self.recipe.adapter.adapter(), self.recipe.adapter.targets

    def warning(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Whether answers can be learnt to end."""
        return stop_token_warning(model, tokenizer, stop_id(tokenizer), self.recipe.adapter.name)

    def measure(self, model: PreTrainedModel, rows: Sequence[Rendered], collator: Any) -> dict[str, float]:
        """The loss."""
        return {"valid_loss": mean_loss(model, rows, collator, self.recipe.train)}
