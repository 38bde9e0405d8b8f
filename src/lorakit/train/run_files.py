"""What a run leaves in its folder: ``run.json``, ``metrics.jsonl``, the loss curve, adapters and checkpoints.

| file | holds |
|---|---|
| ``adapter/`` | the trained adapter, in PEFT's files, with a model card |
| ``best/`` | the adapter that was best on the valid split, where that is watched; ``best.json`` says when |
| ``run.json`` | versions, machine, recipe, hashes of the data, seeds, and how the run ended |
| ``metrics.jsonl`` | one line each ``log_every`` steps: loss, learning rate, tokens, seconds |
| ``loss.png`` | the loss curve, where matplotlib is installed |
| ``checkpoint-N/`` | adapter, optimizer and random states after step N |
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from lorakit.attach import AttachReport
    from lorakit.train.recipe import Recipe
    from lorakit.train.row_set import Row, RowSet

_PACKAGES = ("lorakit", "transformers", "accelerate", "safetensors", "tokenizers")
_STATE = "trainer_state.json"  # what transformers writes last into a checkpoint


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece: a kill leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` says, or None where there is none.

    Raises:
        ConfigError: It is damaged.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove the folder, or choose another output."
        ) from error
    if not isinstance(run, dict):
        raise ConfigError(f"{path} is not the record of a run.")
    return run


def versions() -> dict[str, str]:
    """Package to version, of what a run's numbers may depend on."""
    import torch

    # torch's own word tells the build: 2.13.0+cu130 is listed as 2.13.0
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {package: there for package in _PACKAGES if (there := version_of(package)) is not None}
    if "lorakit" not in found:  # run from the source folder
        import lorakit

        found["lorakit"] = lorakit.__version__
    return found


def version_of(package: str) -> str | None:
    """The version of an installed package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the run ran on."""
    import torch

    from lorakit.ops.native.load import status

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": status().state,
    }


def what_changed(run: Mapping[str, Any], processes: int = 1) -> list[str]:
    """What a resumed run's last digits may depend on and what is not as it was when the run was started.

    Args:
        run: Its ``run.json``.
        processes: How many train together now.
    """
    here = machine()
    now = {**versions(), **{key: here[key] for key in ("processor", "threads", "kernels")}}
    then = {**run.get("versions", {}), **run.get("machine", {})}
    changed = [
        f"{key} was {then[key]}, is {now[key]}" for key in now if key in then and then[key] != now[key]
    ]
    if (before := run.get("processes", 1)) != processes:
        changed.append(f"processes were {before}, are {processes}")
    return changed


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def rows_hash(rows: Iterable[Row], names: Sequence[str] = ()) -> str:
    """A SHA-256 of what is trained on: ids and labels in their order, and the names of the labels."""
    digest = hashlib.sha256(json.dumps(names).encode() if names else b"")
    for row in rows:
        digest.update(json.dumps(row.content).encode())
    return digest.hexdigest()


def run_record(
    recipe: Recipe, rows: RowSet[Any], data_hash: str, steps: int, reports: Sequence[AttachReport]
) -> dict[str, Any]:
    """What ``run.json`` says before the first step."""
    settings = recipe.train
    return {
        "recipe": recipe.plain(),
        "versions": versions(),
        "machine": machine(),
        "command": command_line(),
        "seeds": {
            "init": settings.seed_of("init"),
            "data": settings.seed_of("data"),
            "dropout": settings.seed_of("dropout"),
        },
        "data_hash": data_hash,
        "data": {
            "rows": len(rows.rows),
            "tokens": rows.tokens,
            "learnt": rows.learnt,
            "longest": rows.longest,
            "dropped": rows.dropped,
            "truncated": rows.truncated,
        },
        "steps": steps,
        "trainable": sum(report.trainable for report in reports),
        "base_parameters": reports[0].base_parameters,
    }


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was started with, from its ``run.json``; its output is that folder, wherever it is now.

    Args:
        folder: The run's.
        overrides: Settings that replace those of the recipe, as ``"train.max_seconds=60"``.

    Raises:
        ConfigError: The folder holds no run, or the recipe cannot be read any more.
    """
    from lorakit.train.recipe_file import check_recipe, with_override

    run = read_run(folder) if folder.is_dir() else None
    if run is None or not isinstance(run.get("recipe"), dict):
        raise ConfigError(
            f"{folder} holds no run: there is no run.json with a recipe in it. Name the output folder of lorakit train."
        )
    values: dict[str, Any] = {**run["recipe"], "output": str(folder)}
    for override in overrides:
        values = with_override(values, override)
    return check_recipe(values, {}, None, str(folder / "run.json"))


# ---- checkpoints
def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that a kill left half written is not among them."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_whole(path):
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(folder: Path, recipe: Mapping[str, Any], data_hash: str) -> Path:
    """The last whole checkpoint, if it belongs to the same recipe and data.

    Raises:
        TrainingError: There is none.
        ConfigError: The recipe or the data changed since.
    """
    run = read_run(folder)
    there = checkpoints(folder)
    if run is None or not there:
        raise TrainingError(
            f"There is nothing to resume in {folder}: no whole checkpoint. Checkpoints are written every "
            "train.save_every "
            "steps, and on Ctrl-C. Start without --resume."
        )
    how = run.get("ended", {}).get("how")
    old_patience, new_patience = (
        found.get("train", {}).get("patience") for found in (run.get("recipe", {}), recipe)
    )
    if how == "patience" and old_patience == new_patience:
        raise ConfigError(
            f"The run in {folder} ended because train.patience ({old_patience}) was at its end. To go on all the same, "
            f"raise it: lorakit resume {folder} --set train.patience={2 * (old_patience or 1)}"
        )
    changed = sorted(_differences(run.get("recipe", {}), recipe))
    changed = [key for key in changed if key not in _MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"The recipe is not the one that {folder} was started with: {', '.join(changed)} changed, so "
            "this would not be the "
            "same run. Put it back, or start a new run with another output."
        )
    if run.get("data_hash") != data_hash:
        raise ConfigError(
            f"The training data is not what {folder} was started with. Start a new run with another output."
        )
    return there[-1]


_MAY_CHANGE = (
    "output",
    "train.max_seconds",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.patience",
    "train.report_to",
    "model.name",
)


def _differences(old: Any, new: Any, path: str = "") -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {*old, *new}:
            if (path or key) not in ("generate", "evaluate"):
                yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path


# ---- metrics
class MetricsFile:
    """``metrics.jsonl``: one object a line, written through at once."""

    def __init__(self, path: Path, *, keep_steps: int = 0, writes: bool = True) -> None:
        """Open it, keeping the lines up to a step: a resumed run writes those after it again.

        Args:
            path: Of the file.
            keep_steps: The last step whose lines are kept.
            writes: False in a process that leaves the file to another one.
        """
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= keep_steps] if keep_steps else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``; a last line that a kill cut off is left out."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def plot_loss(
    metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "", unit: str = "token"
) -> Path | None:
    """Draw the loss over the steps as a picture; None where matplotlib is missing or there is nothing to draw.

    Args:
        metrics: Lines of ``metrics.jsonl``.
        path: Of the picture.
        title: Over it.
        unit: What is learnt, see `lorakit.train.loss.Objective`.
    """
    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    valid = [(line["step"], line["valid_loss"]) for line in metrics if "valid_loss" in line]
    if not train or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="#3f51b5", linewidth=1.6, label="train")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="#e65100", marker="o", linewidth=1.6, label="valid")
    axes.set(xlabel="step", ylabel=f"loss per learnt {unit} (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def command_line() -> list[str]:
    """How the program was called, for the record."""
    return list(sys.argv)
