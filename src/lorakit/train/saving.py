"""The output folder of a run: free before it, and then the adapters with their cards, the last and the best ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.attach.attach import state_of
from lorakit.attach.attachments import root_of
from lorakit.errors import ConfigError
from lorakit.io.adapter_directory import write
from lorakit.io.model_outline import outline_of
from lorakit.train.bad_batch import RECORD, TENSORS
from lorakit.train.best import Best
from lorakit.train.model_card import card, public_name, write_card
from lorakit.train.recipe import Recipe
from lorakit.train.run_files import read_run, write_json

if TYPE_CHECKING:
    from torch import nn

    from lorakit.attach import AttachReport

BEST, BEST_RECORD = "best", "best.json"


class Writer:
    """Writes the adapters of a run into its folders, each with a card.

    Attributes:
        model: With the adapters on it.
        recipes: Adapter name to the recipe that it is trained by, whose output is its folder.
        reports: What was attached, by name.
        record: What ``run.json`` says of the run.
        beside: For each adapter what writes other files into a folder of its, such as the chat template.
        writes: False in a process that leaves the writing to another one.
    """

    def __init__(
        self,
        model: nn.Module,
        recipes: Sequence[Recipe],
        reports: Mapping[str, AttachReport],
        record: Mapping[str, Any],
        beside: Sequence[Callable[[Path], None]] = (),
        *,
        writes: bool = True,
    ) -> None:
        self.model, self.reports, self.record, self.writes = model, reports, record, writes
        self.recipes = dict(zip(reports, recipes, strict=True))
        self.beside = dict(zip(reports, beside, strict=False))

    def write(self, place: str, outcome: Mapping[str, Any]) -> dict[str, Path]:
        """Write all adapters into folders of that name; returns the folders.

        What has no effect is left out (`lorakit.core.AdapterState.compact`): the triplets that AdaLoRA has pruned.
        Checkpoints keep it, for training goes on from them.

        Args:
            place: ``"adapter"`` or ``"best"``.
            outcome: What was measured, for the card.
        """
        written = {name: recipe.output / place for name, recipe in self.recipes.items()}
        if not self.writes:
            return written
        for name, recipe in self.recipes.items():
            folder = written[name]
            state = state_of(self.model, name, copy=False).compact()
            written[name] = write(state, folder, outline=outline_of(root_of(self.model)))
            if name in self.beside:
                self.beside[name](folder)
            text = card(
                recipe,
                self.reports[name],
                base=public_name(recipe.model.name),
                trained_on=self.record["data"],
                outcome=outcome,
                versions=self.record["versions"],
            )
            write_card(folder, text)
        return written

    def keep(self, folder: Path, best: Best) -> None:
        """Keep the adapters as the best ones so far.

        Args:
            folder: Of the run, for the record of when that was.
            best: Which measurement it was.
        """
        self.write(BEST, {"step": best.step, best.metric: best.value})
        if self.writes:
            write_json(folder / BEST_RECORD, best.plain())


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that is a file, or that holds a run.

    Args:
        folder: The recipe's output.
        overwrite: Whether a run that is there may be replaced.

    Raises:
        ConfigError: It is not free.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"The output {folder} is a file; name a folder.")
    run = read_run(folder) if folder.is_dir() else None
    if run is not None and not overwrite:
        how = run.get("ended", {}).get("how", "not finished")
        raise ConfigError(
            f"{folder} holds a run already ({how}). Resume it (--resume), replace it (--overwrite), or "
            "name another output (--out)."
        )


def clear(folders: Sequence[Path]) -> None:
    """Remove what an older run left, lest it be taken for this one's; its adapter stays until it is replaced."""
    for folder in folders:
        shutil.rmtree(folder / BEST, ignore_errors=True)
        for path in folder.glob("checkpoint-*"):
            if path.is_dir():
                shutil.rmtree(path)
        for name in (BEST_RECORD, RECORD, TENSORS):
            (folder / name).unlink(missing_ok=True)
