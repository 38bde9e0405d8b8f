"""An adapter's directory: ``adapter_config.json`` and ``adapter_model.safetensors``, in PEFT's form or in our own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.core.effort import shared_effort
from lorakit.errors import AdapterFileError, listing, near_matches
from lorakit.io.embedded import Embedded, parse_embedded
from lorakit.io.native import PEFT_TYPE, read_native, to_native
from lorakit.io.outline import Outline
from lorakit.io.peft_config import changes
from lorakit.io.peft_families import FAMILIES
from lorakit.io.peft_families.reader import read_family
from lorakit.io.peft_form import PeftForm
from lorakit.io.peft_prompts import PROMPTS, read_prompts
from lorakit.io.peft_reader import asks_the_model, read_peft
from lorakit.io.peft_start import with_start
from lorakit.io.peft_writer import to_peft
from lorakit.io.publish import interrupted, publish
from lorakit.io.safetensors_file import encode, load_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_MOST_CONFIG_BYTES = 50_000_000
_MOST_ATTEMPTS = 20


@shared_effort()
def read(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    allow_pickle: bool = False,
    ignore: Collection[str] = (),
    prefer: Literal["config", "weights"] | None = None,
    outline: Outline | Callable[[], Outline] | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> AdapterState:
    """Read an adapter, PEFT's or our own: strictly, without a model, and from the disk alone.

    Args:
        path: A directory, or a ``.safetensors`` file that carries its configuration or lies beside it.
        name: A sub-directory: PEFT puts every adapter but the one called ``"default"`` into one of its own. A directory
            that holds nothing but one such sub-directory need not have it named.
        allow_pickle: Also read a legacy ``adapter_model.bin``; it is unpickled with ``weights_only``.
        ignore: Settings from a later version of PEFT to leave out of account.
        prefer: When ``adapter_config.json`` was changed after we saved the weights: believe the ``"config"``
            file, or the copy in the ``"weights"``. By default that is an error.
        outline: The model's parameters, for what PEFT's files leave to the model; or what draws them up, which is asked
            only if this file leaves anything to it.
        initial: For a PiSSA, OLoRA, CorDA or LoRA-GA adapter that PEFT saved without converting it: the directory of
            the same adapter as it was saved before training. The result is for the stock base.

    Returns:
        The adapter, on the CPU, in the dtypes of the file.

    Raises:
        AdapterFileError: There is no adapter, it is damaged, a tensor is missing, unexpected or of another size, or a
            setting cannot be honoured.
    """
    directory, weights = _locate(Path(path), name, allow_pickle)
    try:
        tensors, embedded, config = _consistent(directory, weights, prefer)
        if config.get("peft_type") == PEFT_TYPE:
            if initial is not None:
                raise AdapterFileError("It is in lorakit's own form, which holds its start: pass no initial.")
            return read_native(config, tensors)
        if outline is not None and not isinstance(outline, Outline):
            outline = outline() if initial is not None or _asks_the_model(config) else None
        if initial is None:
            state = _read_type(config, tensors, embedded, outline, ignore)
        else:
            if (kind := _type(config)) in FAMILIES or kind in PROMPTS:
                raise AdapterFileError(f"An adapter of type {kind} takes no start from the base: no initial.")
            state = read_peft(
                config, tensors, embedded=embedded, outline=outline, ignore=ignore, start_known=True
            )
            before = _initial(Path(initial), allow_pickle, ignore, outline)
            state = with_start(state, before, config.get("init_lora_weights"))
    except AdapterFileError as error:
        if str(weights) in str(error) or str(directory) in str(error):
            raise
        raise type(error)(f"{directory}: {error}") from error
    return state if embedded is None else _with_info(state, embedded, config)


def _read_type(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    embedded: Embedded | None,
    outline: Outline | None,
    ignore: Collection[str],
) -> AdapterState:
    """A file of PEFT's, by its type."""
    kind = _type(config)
    if kind in FAMILIES:
        return read_family(FAMILIES[kind], config, tensors, embedded=embedded, outline=outline, ignore=ignore)
    reader = read_prompts if kind in PROMPTS else read_peft
    return reader(config, tensors, embedded=embedded, outline=outline, ignore=ignore)


def _asks_the_model(config: Mapping[str, Any]) -> bool:
    """Whether a file of PEFT's leaves something to the model."""
    return _type(config) in FAMILIES or _type(config) in PROMPTS or asks_the_model(config)


def _type(config: Mapping[str, Any]) -> str:
    """PEFT's word for the type; as text whatever it is, for it comes from a file."""
    return str(config.get("peft_type"))


def _initial(
    path: Path, allow_pickle: bool, ignore: Collection[str], outline: Outline | None
) -> AdapterState:
    """PEFT's adapter as it was before training."""
    directory, weights = _locate(path, None, allow_pickle)
    tensors, embedded, config = _consistent(directory, weights, None)
    return read_peft(config, tensors, embedded=embedded, outline=outline, ignore=ignore, start_known=True)


Form = Literal["auto", "native"]


def write(
    state: AdapterState,
    directory: str | os.PathLike[str],
    *,
    outline: Outline | None = None,
    form: Form = "auto",
) -> Path:
    """Write an adapter to a directory: in PEFT's form where PEFT has words for it, else in our own.

    Either the whole new adapter is there afterwards or the old one still is, whatever happens in between;
    `why_not_peft` tells the form beforehand.

    Args:
        state: The adapter.
        directory: Made if it does not exist.
        outline: The model's parameters, for what PEFT's files leave to the model.
        form: ``"auto"``, or ``"native"`` for our own form in any case: it keeps the start of PiSSA, OLoRA and LoRA-GA,
            from which training goes on. PEFT's files hold the same change as a LoRA of twice the rank.

    Returns:
        The directory.

    Raises:
        AdapterFileError: It could not be written.
    """
    directory = Path(directory)
    if form not in get_args(Form):
        raise AdapterFileError(f"form is 'auto' or 'native'; got {form!r}.")
    peft = (
        PeftForm(reasons=["lorakit's own form was asked for"])
        if form == "native"
        else to_peft(state, outline)
    )
    if peft.reasons:
        config, tensors = to_native(state, peft.reasons)
        embedded = Embedded(config)
    else:
        config, tensors = peft.config, peft.tensors
        embedded = Embedded(config, state.spec.info, peft.parameters, peft.tables, peft.shapes)
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"The adapter's spec must hold plain JSON: {error}.") from None
    publish(directory, (WEIGHTS, encode(tensors, embedded.metadata())), (CONFIG, text.encode("utf-8")))
    return directory


def why_not_peft(state: AdapterState, *, outline: Outline | None = None) -> list[str]:
    """The reasons why PEFT's files cannot hold an adapter; none when they can.

    The same as `write` records in a native file, under ``lorakit.why_not_peft``.
    """
    return to_peft(state, outline).reasons


# ---- finding the files
def _locate(path: Path, name: str | None, allow_pickle: bool) -> tuple[Path, Path]:
    """The directory and the file of the weights."""
    if path.is_file():
        if name is not None:
            raise AdapterFileError(f"{path} is a file, so it has no sub-directory {name!r}.")
        if path.name.endswith(".bin"):
            return path.parent, _pickle(path, allow_pickle)
        return path.parent, path
    if not path.is_dir():
        hint = (
            near_matches(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        )
        raise AdapterFileError(f"There is no adapter at {path}: no such file or directory.{hint}")
    inside = sorted(p.name for p in path.iterdir() if p.is_dir() and _holds_adapter(p))
    if name is not None and not (name == "default" and _holds_adapter(path)):
        if name not in inside:
            there = f"It has: {listing(inside)}." if inside else "It has no adapters in sub-directories."
            raise AdapterFileError(
                f"{path} has no adapter called {name!r}.{near_matches(name, inside)} {there}"
            )
        path = path / name
    elif not _holds_adapter(path):
        if len(inside) > 1:
            raise AdapterFileError(
                f"{path} holds several adapters: {listing(inside, most=20)}. Say which: read(..., name={inside[0]!r}) "
                f"or load(..., subfolder={inside[0]!r})."
            )
        if not inside:
            raise AdapterFileError(f"{path} holds no adapter: neither {CONFIG} nor {WEIGHTS} is there.")
        path = path / inside[0]
    if (path / WEIGHTS).is_file():
        return path, path / WEIGHTS
    if (path / PICKLE).is_file():
        return path, _pickle(path / PICKLE, allow_pickle)
    raise AdapterFileError(f"{path} has {CONFIG} but no {WEIGHTS}: the tensors of the adapter are missing.")


def _holds_adapter(directory: Path) -> bool:
    return any((directory / file).is_file() for file in (CONFIG, WEIGHTS))


def _pickle(path: Path, allowed: bool) -> Path:
    if not allowed:
        raise AdapterFileError(
            f"{path} is a pickle, which can run code when it is opened. If you trust it, read it with "
            "allow_pickle=True (only tensors "
            "are let through), and save it again to be rid of it."
        )
    return path


def _load(weights: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not weights.name.endswith(".bin"):
        return load_tensors(weights)
    try:
        loaded = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{weights} is damaged, or holds more than tensors: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise AdapterFileError(f"{weights} is not a mapping from names to tensors.")
    return {key: value.detach() for key, value in loaded.items()}, {}


# ---- which configuration holds
def _consistent(
    directory: Path, weights: Path, prefer: str | None
) -> tuple[dict[str, Tensor], Embedded | None, Mapping[str, Any]]:
    """Tensors and the configuration that belongs to them, also while another process saves over them."""
    for attempt in itertools.count(1):
        before = _identities(weights, directory / CONFIG)
        tensors, metadata = _load(weights)
        embedded = parse_embedded(weights, metadata)
        try:
            return tensors, embedded, _config(directory, embedded, prefer)
        except AdapterFileError:
            if attempt == _MOST_ATTEMPTS or _identities(weights, directory / CONFIG) == before:
                raise
    raise AssertionError("unreachable")


def _identities(*paths: Path) -> list[tuple[int, int, int] | None]:
    """What tells a file from one that took its place."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return found


def _config(directory: Path, embedded: Embedded | None, prefer: str | None) -> Mapping[str, Any]:
    """The configuration that belongs to the weights: the file's, or after an interrupted save the weights' own."""
    path = directory / CONFIG
    if prefer not in (None, "config", "weights"):
        raise AdapterFileError(f"prefer is 'config' or 'weights'; got {prefer!r}.")
    if embedded is None:
        if not path.is_file():
            raise AdapterFileError(
                f"{directory} has no {CONFIG}, and the weights carry no configuration of their own."
            )
        return _parse(path)
    if prefer == "weights" or not path.is_file():
        return embedded.config
    found = _parse(path)
    if found == embedded.config or prefer == "config":
        return found
    if interrupted(directory, CONFIG, embedded.config) is not None:
        return embedded.config
    different = changes(embedded.config, found)
    if not different:
        return found
    raise AdapterFileError(
        f"{path} is not the configuration that the weights were saved with ({listing(different)}). If you "
        "changed it, read it with "
        "prefer='config'; if the file is of another adapter, or a save was cut short, with prefer='weights'."
    )


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise AdapterFileError(
                f"{path} has {path.stat().st_size} bytes: that is no adapter's configuration."
            )
        config = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object.")
    return config


def _with_info(state: AdapterState, embedded: Embedded, config: Mapping[str, Any]) -> AdapterState:
    """The info that the adapter was saved with, but for settings that were changed in the configuration since."""
    info = dict(embedded.info)
    now = state.spec.info.get("peft", {})
    if config != embedded.config:
        info["peft"] = now
    elif "transposed" in now:
        info["peft"] = {**info.get("peft", {}), "transposed": now["transposed"]}
    return dataclasses.replace(state, spec=dataclasses.replace(state.spec, info=info))
