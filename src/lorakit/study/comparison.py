"""Train several settings on the same labelled texts, score each, and lay the results side by side.

Each setting is a recipe, run by the code behind ``lorakit train`` and ``lorakit eval``; its result is a JSON file of
its own, so a run that was stopped goes on with the settings that are still missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.adapters import truncate
from lorakit.attach import detach, extract
from lorakit.core import AdapterState
from lorakit.errors import ConfigError, LorakitError
from lorakit.io.model_files import save
from lorakit.targets.counting import base_bytes
from lorakit.train import Progress, Recipe, Silent, TrainResult, evaluate, train
from lorakit.train.data import Split
from lorakit.train.run_files import machine, versions, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setting:
    """One thing to compare.

    Attributes:
        name: What the table calls it.
        adapter: The recipe's section ``adapter``.
        train: What differs from the common section ``train``, above all the learning rate.
        model: What differs from the common section ``model``.
        ranks: Ranks that the trained adapter is also cut to and scored at (DyLoRA).
    """

    name: str
    adapter: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    @property
    def file(self) -> str:
        """A file name without ending."""
        name = self.name.lower().replace("+", " plus")
        return "-".join("".join(c if c.isalnum() else " " for c in name).split())

    def recipe(self, common: Mapping[str, Any], output: Path) -> dict[str, Any]:
        """What a recipe file would hold."""
        return {
            **common,
            "model": {**common["model"], **self.model},
            "adapter": dict(self.adapter),
            "train": {**common["train"], **self.train},
            "output": str(output),
        }


@dataclass(frozen=True)
class Outcome:
    """What one setting gave.

    Attributes:
        name: The setting's.
        correct: Rows that were labelled right.
        count: Rows that were scored.
        macro_f1: Mean F1 of the labels over the last split that was scored.
        trainable: Trained parameters, the head among them.
        seconds: Training alone.
        steps: Optimizer steps.
        loss: Of the last step.
        adapter_bytes: The weights of the saved adapter.
        base_bytes: All weights of the base, quantised ones as they are kept.
        cut: Rank to rows that were labelled right, for an adapter that was cut to several.
        note: What else is to be told.
        recipe: What was run.
        machine: What it ran on.
        versions: Of what the numbers may depend on.
    """

    name: str
    correct: int
    count: int
    macro_f1: float
    trainable: int
    seconds: float
    steps: int
    loss: float
    adapter_bytes: int
    base_bytes: int
    cut: dict[str, int]
    note: str
    recipe: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def accuracy(self) -> float:
        """The share that was labelled right."""
        return self.correct / self.count

    @property
    def spread(self) -> float:
        """The standard error of the accuracy, as far as the number of scored rows makes it."""
        return (self.accuracy * (1 - self.accuracy) / self.count) ** 0.5


def compare(
    settings: Sequence[Setting],
    common: Mapping[str, Any],
    folder: Path,
    *,
    splits: Sequence[Split] = ("test",),
    progress: Progress | None = None,
) -> tuple[list[Outcome], dict[str, str]]:
    """Run the settings that have no result yet.

    Args:
        settings: In the order of the table; their names must differ.
        common: What all recipes share: ``task: classification``, ``model`` as a mapping, ``data``, ``train``.
        folder: A JSON file for each setting, and the run of each in a folder of that name.
        splits: What is scored, all together.
        progress: Whom to tell.

    Returns:
        The outcomes that there are now, and for each setting that failed the reason.

    Raises:
        ConfigError: Two settings would write the same file.
    """
    progress = progress or Silent()
    files = [setting.file for setting in settings]
    if twice := {file for file in files if files.count(file) > 1}:
        raise ConfigError(f"Two settings are called {min(twice)!r}: give each a name of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes, failed = [], {}
    for setting in settings:
        path = folder / f"{setting.file}.json"
        values = setting.recipe(common, folder / setting.file)
        outcome = read_outcome(path, values)
        if outcome is None:
            progress.say(f"---- {setting.name}")
            try:
                outcome = _run(setting, values, splits, progress)
            except LorakitError as error:
                progress.say(f"{setting.name} failed: {error}")
                failed[setting.name] = str(error)
                continue
            write_json(path, asdict(outcome))
        cut = "".join(f", rank {r}: {100 * n / outcome.count:.1f} %" for r, n in outcome.cut.items())
        progress.say(f"{setting.name}: {100 * outcome.accuracy:.1f} %{cut}, {outcome.seconds:.0f} s")
        outcomes.append(outcome)
    return outcomes, failed


def read_outcome(path: Path, recipe: Mapping[str, Any]) -> Outcome | None:
    """The result in a file, unless it is missing or of another recipe."""
    try:
        outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return outcome if outcome.recipe == json.loads(json.dumps(recipe)) else None


def _run(setting: Setting, values: dict[str, Any], splits: Sequence[Split], progress: Progress) -> Outcome:
    recipe = Recipe.from_mapping(values)
    result = train(recipe, overwrite=True, progress=progress)
    state = extract(result.model, result.name)
    size = base_bytes(result.model)
    detach(result.model)
    correct, count, macro_f1 = _score(recipe, result.adapter, splits, result.model, result.tokenizer)
    return Outcome(
        name=setting.name,
        correct=correct,
        count=count,
        macro_f1=macro_f1,
        trainable=result.report.trainable,
        seconds=round(result.seconds, 2),
        steps=result.steps,
        loss=result.losses[-1],
        adapter_bytes=sum(file.stat().st_size for file in result.adapter.glob("*.safetensors")),
        base_bytes=size,
        cut={str(r): correct for r, correct in _cut(setting, recipe, state, splits, result)},
        note=_note(state),
        recipe=values,
        machine=machine(),
        versions=versions(),
    )


def _score(
    recipe: Recipe,
    adapter: Path,
    splits: Sequence[Split],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, int, float]:
    """Rows that a saved adapter labels right, rows in all, and the last split's macro F1."""
    correct = count = 0
    macro_f1 = 0.0
    for split in splits:
        scored = evaluate(recipe, adapter=adapter, split=split, model=model, tokenizer=tokenizer)
        correct += sum(label.correct for label in scored.labels)
        count += scored.count
        macro_f1 = scored.scores["macro_f1"]
    return correct, count, macro_f1


def _cut(
    setting: Setting, recipe: Recipe, state: AdapterState, splits: Sequence[Split], result: TrainResult
) -> Iterator[tuple[int, int]]:
    """For each rank that is asked for, the rows that the adapter labels right when it is cut to it."""
    for r in setting.ranks:
        part = save(truncate(state, r), result.folder / f"rank-{r}")
        yield r, _score(recipe, part, splits, result.model, result.tokenizer)[0]
        shutil.rmtree(part)


def _note(state: AdapterState) -> str:
    """Where ranks were shared out, how many there are now."""
    values = [group["lora_E"] for group in state.tensors.values() if "lora_E" in group]
    if not values:
        return ""
    kept = sum(int(torch.count_nonzero(E)) for E in values)
    return f"{kept} of {sum(E.numel() for E in values)} singular values kept at {len(values)} targets"


# ---- the table
def markdown(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table, with what they were measured on."""
    lines = [
        "| method | accuracy | trained parameters | seconds | adapter, MB | base, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for o in outcomes:
        lines.append(
            f"| {o.name} | {100 * o.accuracy:.1f} % ± {100 * o.spread:.1f} | {o.trainable:,} | {o.seconds:.0f} | "
            f"{o.adapter_bytes / 1e6:.2f} | {o.base_bytes / 1e6:.1f} |"
        )
        lines += [
            f"| {o.name}, cut to rank {r} | {100 * n / o.count:.1f} % | | | | |" for r, n in o.cut.items()
        ]
    notes = [f"- {o.name}: {o.note}." for o in outcomes if o.note]
    where = dict.fromkeys(
        f"{o.machine['processor']}, {o.machine['threads']} torch threads; "
        + ", ".join(f"{package} {number}" for package, number in o.versions.items())
        for o in outcomes
    )
    scored = dict.fromkeys(f"{o.count} rows scored" for o in outcomes)
    return "\n".join(
        [*lines, "", *notes, *([""] if notes else []), f"{'; '.join(scored)}. {' | '.join(where)}.", ""]
    )
