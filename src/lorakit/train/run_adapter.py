"""Which adapter a folder means: its own, or the one of the run whose output folder it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError, listing
from lorakit.io import read
from lorakit.models.load import Task
from lorakit.models.purpose import purpose_in
from lorakit.train.run_files import read_run

_LAST, _BEST = "adapter", "best"


def find_adapter(folder: Path, which: str = "last") -> tuple[Path, str | None]:
    """The adapter's folder in a run's folder (or that folder itself), and the base that the record names.

    Args:
        folder: A run's output folder, or an adapter's; of a run with several adapters the folder of one of them.
        which: Of a run: ``"last"`` or ``"best"``.

    Raises:
        ConfigError: There is none: what is there.
        AdapterFileError: It cannot be read.
    """
    if which not in ("last", "best"):
        raise ConfigError(f"--which is last or best; got {which!r}.")
    run = _run_in(folder)
    if run is None:
        if which == "best":
            raise ConfigError(
                f"{folder} is no run's folder (it has no run.json), so it has no best adapter apart."
            )
        return folder, _base_of_run_around(folder) or read(folder).spec.base
    return _in_run(folder, {"last": _LAST, "best": _BEST}[which]), _base_of(run)


def adapter_folder(folder: Path) -> Path:
    """The last adapter in a run's folder; any other folder is an adapter's own, and is returned as it is.

    Raises:
        ConfigError: The run has several adapters, or none yet.
    """
    return folder if _run_in(folder) is None else _in_run(folder, _LAST)


def adapter_for(folder: Path, wanted: str, *kinds: Task) -> Path:
    """The adapter that a folder means, which must not be known to be for another kind of model.

    Args:
        folder: As for `adapter_folder`.
        wanted: What an adapter for another kind does not do, for the error: ``"writes no texts"``.
        kinds: The kinds of models that will do.

    Raises:
        ConfigError: There is none, or it is for another task.
        AdapterFileError: It cannot be read.
    """
    adapter = adapter_folder(folder)
    info = read(adapter).spec.info
    purpose = purpose_in(info)
    if purpose.kind is None or purpose.kind in kinds:
        return adapter
    task = info.get("task")
    how = (
        f"lorakit classify MODEL --adapter {folder} labels texts with it"
        if task == "classification"
        else "lorakit eval RECIPE scores it on data, and its page in the documentation shows its use in Python"
    )
    raise ConfigError(
        f"{adapter} was trained for {f'task: {task}' if task else purpose.kind}, and {wanted}: {how}."
    )


def _run_in(folder: Path) -> dict[str, Any] | None:
    """The record of the run whose output folder this is, or that of one of its several adapters."""
    if not folder.is_dir():
        return None
    run = read_run(folder)
    if run is not None:
        names = _several(run)
        if names:
            raise ConfigError(
                f"{folder} holds {len(names)} adapters: {listing(names, most=20)}. Name the folder of one of them: "
                f"{folder / names[0]}."
            )
        return run
    around = folder.resolve()
    run = read_run(around.parent)
    return run if around.name in _several(run) else None


def _in_run(folder: Path, name: str) -> Path:
    adapter = folder / name
    if adapter.is_dir():
        return adapter
    there = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    hint = (
        "train with train.eval_every and a valid split to keep the best one"
        if name == _BEST
        else "the run has not ended; go on with lorakit resume"
    )
    raise ConfigError(f"{folder} holds no {name}/ ({hint}). It holds: {listing(sorted(there)) or 'nothing'}.")


def _several(run: dict[str, Any] | None) -> list[str]:
    """The names of the adapters of a run that has several."""
    parts = ((run or {}).get("recipe") or {}).get("adapters") or []
    return [str(part["name"]) for part in parts]


def _base_of(run: dict[str, Any]) -> str | None:
    """The base that a run's record names."""
    section = (run.get("recipe") or {}).get("model")
    name = section.get("name") if isinstance(section, dict) else None
    return None if name is None else str(name)


def _base_of_run_around(adapter: Path) -> str | None:
    """The base by the record of the run in whose folder an adapter lies: its own files hold but a public name."""
    runs = (read_run(folder) for folder in adapter.resolve().parents[:2])
    return next((name for run in runs if run is not None and (name := _base_of(run)) is not None), None)
