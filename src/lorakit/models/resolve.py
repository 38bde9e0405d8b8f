"""From the name of a base model to where it is: a folder, a built-in model, or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.errors import ModelError, listing, near_matches
from lorakit.folders import old_beside, put_back
from lorakit.models.builtin import BUILTINS, builtin_listing, model_folder

ModelKind = Literal["folder", "builtin", "hub"]

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ResolvedModel:
    """A base model that has been found.

    Attributes:
        name: The name as the user gave it.
        kind: `folder`, `builtin`, or `hub`.
        location: What transformers' `from_pretrained` takes: the folder's path, or the hub id.
        family: The architecture as transformers' `model_type` ("llama", "bert"); None for a hub id, whose config has
            not been read.
        architectures: The model classes that the config names ("LlamaForCausalLM"); empty for a hub id.
        licence: SPDX identifier of the weights' licence, where it is known (built-in models).
    """

    name: str
    kind: ModelKind
    location: str
    family: str | None = None
    architectures: tuple[str, ...] = ()
    licence: str | None = None

    @property
    def path(self) -> Path | None:
        """The local folder; None for a hub id."""
        return None if self.kind == "hub" else Path(self.location)


def resolve(name: str | Path) -> ResolvedModel:
    """Find the base model that `name` means.

    A built-in name ("smollm2") is the built-in model, fetched on first use; a folder of that name is written
    "./smollm2". An existing folder is that folder. Otherwise "org/name" is a hub id. Folders and cached built-in
    models need no network; a hub id is not looked up here.

    Raises:
        ModelError: Nothing has that name, or the folder holds no model.
    """
    text = str(name)
    if isinstance(name, str) and text in BUILTINS:
        folder = model_folder(text)
        family, architectures = _read_config(folder)
        return ResolvedModel(text, "builtin", str(folder), family, architectures, BUILTINS[text].licence)
    folder = Path(text).expanduser()
    if text and not folder.exists():
        _put_back(folder)
    if text and folder.is_dir():
        family, architectures = _read_config(folder)
        return ResolvedModel(text, "folder", str(folder), family, architectures)
    if isinstance(name, str) and _HUB_ID.fullmatch(text):
        return ResolvedModel(text, "hub", text)
    raise ModelError(_unknown(text, folder))


def _put_back(folder: Path) -> None:
    """Where a process was killed while it replaced this folder, the old one is it again."""
    try:
        put_back(folder)
    except OSError as error:
        raise ModelError(
            f"{folder} was being replaced when a process was killed: the old folder is beside it, under a hidden name, "
            f"and cannot be put back: {error}"
        ) from error


def _read_config(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():  # transformers would apply it in silence
        raise ModelError(
            f"{folder} holds an adapter, not a base model. Name the base model here and load the adapter onto it."
        )
    if not path.is_file():
        inside = listing(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ModelError(f"{folder} holds no model: it has no config.json (it holds {inside}).")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config.get("model_type"), tuple(config.get("architectures") or ())
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is not a model's config: {error}") from error


def _unknown(text: str, folder: Path) -> str:
    if folder.is_file():
        return f"{text} is a file. Name the folder that holds config.json and the weights."
    if text and (old := old_beside(folder)):
        return (
            f"There is no folder {text}. {listing(old)} may be what was there: a process was replacing it, on another "
            "machine or still running. Rename it to what it was, or wait."
        )
    return (
        f"There is no base model {text!r}: no folder of that name, no built-in model.{_nearest(text, folder)}\n"
        f"The built-in models are:\n{builtin_listing()}\n"
        "Anything else is named by its folder, or by its hub id as org/name."
    )


def _nearest(text: str, folder: Path) -> str:
    if not text:
        return ""
    if folder.parent != Path(".") and folder.parent.is_dir():  # a path that goes wrong at its last part
        return near_matches(folder.name, (entry.name for entry in folder.parent.iterdir() if entry.is_dir()))
    # "SmolLM2-135M-Instruct" and "all-MiniLM" mean built-in models too.
    for name, builtin in BUILTINS.items():
        if near_matches(text.lower(), [name, builtin.hub_id.split("/")[1].lower()]):
            return f" Did you mean {name!r}?"
    return ""
