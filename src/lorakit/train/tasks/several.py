"""Several adapters in one pass over one base: each learns its own data, in rows of its own.

A batch of the run is one batch of each adapter, the same that it would have alone; every row is routed through its own
adapter, and each adapter's loss is a mean over its own rows. So the base runs once over one larger batch, and what each
adapter becomes is what it would have become alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.attach import use
from lorakit.errors import ConfigError
from lorakit.models import ResolvedModel
from lorakit.train.collate import Collator
from lorakit.train.data import Split
from lorakit.train.loss import Objective, without
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe
from lorakit.train.results import EvalResult
from lorakit.train.row_set import Row, RowSet
from lorakit.train.strands import Strand
from lorakit.train.task import Attachable, Task
from lorakit.train.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWNERS = "owners"


@dataclass(frozen=True)
class OwnedRow:
    """A row of one of the adapters.

    Attributes:
        owner: The adapter's number.
        row: What it learns from.
    """

    owner: int
    row: Any

    @property
    def id(self) -> str:
        """The row's."""
        return str(self.row.id)

    @property
    def length(self) -> int:
        """The row's."""
        return int(self.row.length)

    @property
    def texts(self) -> Sequence[Row]:
        """The row's."""
        texts: Sequence[Row] = self.row.texts
        return texts

    @property
    def written(self) -> int:
        """The row's."""
        return int(self.row.written)

    @property
    def content(self) -> Any:
        """Whose it is, and the row's."""
        return [self.owner, self.row.content]


@dataclass(frozen=True, kw_only=True)
class OwnedSet(RowSet[OwnedRow]):
    """The rows of all adapters.

    Attributes:
        names: The adapters' names.
        sets: Each adapter's rows.
    """

    names: tuple[str, ...]
    sets: tuple[RowSet[Any], ...]

    @property
    def learnt(self) -> int:
        """What all adapters learn."""
        return sum(rows.learnt for rows in self.sets)

    @property
    def taught(self) -> str:
        """The adapters' shares."""
        counts = [sum(row.owner == i for row in self.rows) for i in range(len(self.names))]
        shares = (f"{name} {count:,}" for name, count in zip(self.names, counts, strict=True))
        return f"rows of {len(self.names)} adapters: {', '.join(shares)}"


@dataclass(frozen=True)
class OwnedCollator:
    """The batches of another collator, with the number of the adapter of each row.

    Attributes:
        inner: Makes the tensors of the rows themselves.
    """

    inner: Collator

    @property
    def padded(self) -> bool:
        """As the inner one."""
        return self.inner.padded

    def __call__(self, rows: Sequence[OwnedRow]) -> dict[str, Tensor]:
        """The inner batch, and ``owners`` ``(rows,)``."""
        batch = self.inner([row.row for row in rows])
        return {**batch, _OWNERS: torch.tensor([row.owner for row in rows])}


class Several(Task):
    """The tasks of several adapters as one. The adapters' tasks are of one kind, and share the model."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.parts = tuple(task_of(part) for part in recipe.parts())
        self.names = tuple(part.recipe.adapter.name for part in self.parts)
        self.measures = (
            "valid_loss",
            *(
                f"{key}_{name}"
                for name, part in zip(self.names, self.parts, strict=True)
                for key in part.measures
            ),
        )
        inner = self.parts[0].objective
        each = inner.each
        if each is None:
            raise ConfigError(f"task: {recipe.task} cannot train several adapters in one pass.")

        def summed(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
            owners, rest = batch[_OWNERS], without(batch, _OWNERS)
            with use(base, rows=self.routes(batch)):
                losses, rows = each(model, base, rest)
            return losses.new_zeros(len(self.names)).index_add(0, owners[rows], losses)

        self.objective = Objective(
            summed,
            self._counts,
            inner.unit,
            read=lambda batch: inner.read(without(batch, _OWNERS)),
            reads=inner.reads,
        )
        self._inner = inner

    def routes(self, batch: Mapping[str, Tensor]) -> list[str]:
        """The adapter of each row of a batch, or of each token of a packed one."""
        owners = batch[_OWNERS].tolist()
        if "cu_seq_lens_q" not in batch:
            return [self.names[owner] for owner in owners]
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        return [
            self.names[owner] for owner, length in zip(owners, lengths, strict=True) for _ in range(length)
        ]

    def _counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        counts = torch.zeros(len(self.names), dtype=torch.long)
        owners = batch[_OWNERS].cpu()
        rest = {name: tensor.cpu() for name, tensor in without(batch, _OWNERS).items()}
        for i, owner in enumerate(owners.tolist()):
            counts[owner] += int(self._inner.count(row_of(rest, i)))
        return counts

    def has_split(self, split: Split) -> bool:
        return any(part.has_split(split) for part in self.parts)

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> OwnedSet:
        """The rows of all adapters, the first one's first."""
        there = {i: part.rows(tokenizer, split) for i, part in enumerate(self.parts) if part.has_split(split)}
        sets = tuple(there.values())
        return OwnedSet(
            rows=tuple(OwnedRow(i, row) for i, rows in there.items() for row in rows.rows),
            longest=max(rows.longest for rows in sets),
            truncated=sum(rows.truncated for rows in sets),
            dropped=sum(rows.dropped for rows in sets),
            names=self.names,
            sets=sets,
        )

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        return self.parts[0].load(resolved)

    def accept(self, model: PreTrainedModel) -> None:
        for part in self.parts:
            part.accept(model)

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        self.parts[0].check_length(model, [row.row for row in rows if isinstance(row, OwnedRow)])

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """The adapters' own; padded where one of their methods cannot be packed."""
        made = [part.collator(model, tokenizer) for part in self.parts]
        inner, reason = next((pair for pair in made if pair[0].padded), made[0])
        return OwnedCollator(inner), reason

    def collator_of(self, part: Task, collator: Any) -> Collator:
        inner: Collator = collator.inner
        return inner

    def batches(self, rows: Sequence[OwnedRow], padded: bool) -> list[list[int]]:
        """Batch by batch what each adapter would have alone; the longest run decides how many there are."""
        plans: list[list[list[int]]] = []
        for i, part in enumerate(self.parts):
            own = [number for number, row in enumerate(rows) if row.owner == i]
            plan = part.batches([rows[number].row for number in own], padded)
            plans.append([[own[k] for k in batch] for batch in plan])
        most = max(len(plan) for plan in plans)
        return [[k for plan in plans if j < len(plan) for k in plan[j]] for j in range(most)]

    def rows_of(self, part: Task, rows: Sequence[OwnedRow]) -> list[Any]:
        return [row.row for row in rows if self.parts[row.owner] is part]

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Sequence[Strand]:
        """The row's own, with the name of the adapter that learns from it."""
        inner = self.parts[row.owner].strands(tokenizer, row.row)
        owner = self.names[row.owner]
        return [replace(strand, name=f"{owner} {strand.name}".strip()) for strand in inner]

    def adapter(self, model: PreTrainedModel) -> Attachable:
        """Each part has its own."""
        raise NotImplementedError("The adapters of several parts are attached part by part.")

    def measure(self, model: PreTrainedModel, rows: Sequence[OwnedRow], collator: Any) -> dict[str, float]:
        """What each adapter measures on its own rows, under its name; ``valid_loss`` is the mean."""
        found: dict[str, float] = {}
        losses = []
        for name, part in zip(self.names, self.parts, strict=True):
            own = self.rows_of(part, rows)
            if own:
                with use(model, name):
                    measured = part.measure(model, own, collator.inner)
                losses.append(measured["valid_loss"])
                found |= {f"{key}_{name}": value for key, value in measured.items()}
        return {"valid_loss": sum(losses) / len(losses), **found}

    def examples(self, split: Split, limit: int | None) -> Sequence[Any]:
        """Several adapters are scored one by one.

        Raises:
            ConfigError: Always; it says how.
        """
        raise ConfigError(
            f"The recipe has {len(self.names)} adapters, each with data of its own: score each with its own part, "
            "Recipe.parts() in Python; `lorakit eval` does that by itself."
        )

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        raise NotImplementedError("Several adapters are scored part by part.")


def row_of(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One row of a batch, or one document of a packed one, as a batch."""
    if "cu_seq_lens_q" not in batch:
        return {name: tensor[number : number + 1] for name, tensor in batch.items()}
    start, end = batch["cu_seq_lens_q"][number : number + 2].tolist()
    return {name: tensor[:, start:end] for name, tensor in batch.items() if not name.startswith("cu_seq")}
