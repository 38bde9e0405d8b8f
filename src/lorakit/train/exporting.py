"""From a run's folder to what another program takes: a merged model, or the adapter in another format."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, ConfigError, MergeError, ModelError, listing, near_matches
from lorakit.io import read
from lorakit.io.formats import FORMATS, Hints, convert
from lorakit.io.formats.gguf import model_facts
from lorakit.models.chat_template import copy_template
from lorakit.train.run_adapter import find_adapter

MERGED = "merged"
_FOLDERS = ("peft", "native")
_ENDINGS = {"gguf": ".gguf"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        adapter: What it was made from.
        format: As asked.
        path: Where it is: a folder for a merged model, ``peft`` and ``native``, else a file.
        bytes: Its size.
        base: The base model, where it was needed.
        difference: Of a model that was merged in memory: the largest difference of an output (a logit, or an entry of
            the last hidden states) to base and adapter side by side.
        rounding: Of a model that was merged tensor by tensor: what rounding took, as a share of the norm of the change.
        losses: What the format cannot say.
    """

    adapter: Path
    format: str
    path: Path
    bytes: int
    base: str | None = None
    difference: float | None = None
    rounding: float | None = None
    losses: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        plain = dataclasses.asdict(self)
        return {**plain, "adapter": str(self.adapter), "path": str(self.path)}


def export(
    folder: str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    which: str = "last",
    model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> Exported:
    """Export an adapter.

    Args:
        folder: A run's output folder, or an adapter's; of a run with several adapters the folder of one of them.
        to: ``"merged"``, ``"peft"``, ``"native"``, or a name in `lorakit.io.formats.FORMATS`.
        out: Where to; by default beside the adapter, named after the format.
        which: Of a run: ``"last"`` or ``"best"``.
        model: The base; by default the one that the run or the adapter names.
        dtype: Of a merged model.
        overwrite: Replace what is there.

    Raises:
        ConfigError: The format is unknown, there is no such adapter, or no base is known where one is needed.
        AdapterFileError: The adapter cannot be read, or not be said in that format.
    """
    known = [MERGED, *_FOLDERS, *FORMATS]
    if to not in known:
        raise ConfigError(
            f"There is no format {to!r}.{near_matches(to, known)} Known: {listing(known, most=20)}."
        )
    adapter, base = find_adapter(Path(folder), which)
    base = model or base
    path = Path(out) if out is not None else adapter.parent / f"{adapter.name}-{to}{_ENDINGS.get(to, '')}"
    if out is None and to not in (MERGED, *_FOLDERS, *_ENDINGS):
        path = path.with_name(f"{path.name}.safetensors")
    if to == MERGED:
        return _merged(adapter, path, _needed(base, adapter), dtype, overwrite=overwrite)
    hints = Hints()
    if to == "gguf":
        family, heads = model_facts(_config_folder(_needed(base, adapter)))
        hints = Hints(family=family, heads=heads)
    done = convert(adapter, path, to, hints=hints, overwrite=overwrite)
    if to in _FOLDERS:
        copy_template(adapter, path)
    named = base if to == "gguf" else None
    return Exported(adapter, to, done.path, done.bytes, named, losses=tuple(done.losses))


def _needed(base: str | None, adapter: Path) -> str:
    if base is None:
        raise ConfigError(f"{adapter} does not name its base model: say it with --model.")
    return base


def _config_folder(base: str) -> Path:
    """The folder with the config of a base, which a built-in or hub model has in a cache."""
    from lorakit.models import resolve

    path = resolve(base).path
    if path is not None:
        return path
    from transformers.utils import cached_file

    found = cached_file(base, "config.json")
    assert found is not None
    return Path(found).parent


def _merged(adapter: Path, out: Path, base: str, dtype: str, *, overwrite: bool) -> Exported:
    """One tensor at a time where that can be done; with the model loaded for hub ids, ResNets, and the like."""
    from lorakit.models.image_classifier import find_image_model
    from lorakit.models.streaming_merge import merge_checkpoint
    from lorakit.train.merging import merge_to_folder

    try:
        found = find_image_model(base)
    except ModelError as error:
        if read(adapter).spec.info.get("task") != "image-classification":
            raise
        raise ConfigError(
            f"{str(error).splitlines()[0]} Say where it is with --model. A network of your own is merged in Python: "
            f'lk.load(network, "{adapter}") and then lk.merge(network, permanent=True).'
        ) from error
    if not isinstance(found, str) and found.path is not None:
        try:
            streamed = merge_checkpoint(base, [adapter], out, dtype=dtype, overwrite=overwrite)
        except (MergeError, AdapterFileError, ModelError):
            pass  # what has no place in the checkpoint may have one in the model
        else:
            return Exported(adapter, MERGED, streamed.folder, streamed.bytes, base, rounding=streamed.error)
    made = merge_to_folder(base, [adapter], out, dtype=dtype, overwrite=overwrite)
    return Exported(adapter, MERGED, made.folder, made.bytes, base, difference=made.saved_difference)
