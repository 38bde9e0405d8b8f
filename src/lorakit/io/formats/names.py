"""Lists of a model's layers: what turns a flattened or numbered name in a file back into a path.

kohya writes ``lora_unet_mid_block_attentions_0_proj_in`` for ``unet.mid_block.attentions.0.proj_in``. Dots and
underscores cannot be told apart afterwards, so such a name is looked up in a list of the model's layers: a built-in
one, a text file, or the header of the model's own ``.safetensors`` file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lorakit.errors import AdapterFileError, listing, near_matches
from lorakit.io.safetensors_file import MOST_HEADER_BYTES, damaged, parse_header

Size = tuple[int, ...]
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a diffusion pipeline, by diffusers' names; the first word of a path there."""

WHOLE_MODEL = "lycoris"
"""LyCORIS's prefix for a model that is no diffusion pipeline."""

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
    "": (WHOLE_MODEL,),
}
"""Part of a pipeline to the prefixes that kohya gives it, the one to write first."""


@dataclass(frozen=True)
class Names:
    """The layers of a model.

    Attributes:
        title: What the list is called in messages.
        sizes: Path to the size of the layer's weight, in the model's order; an empty size is unknown.
        prefixes: As `PREFIXES`, for this model.
        other: Path to the name (with dots, without its part) that kohya flattens instead of the path: SDXL's UNet goes
            by the names of its first implementation.
        numbered: Part of a pipeline to the kinds of blocks that cloneofsimo searches, and the layers in its order.
    """

    title: str
    sizes: Mapping[str, Size]
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PREFIXES)
    other: Mapping[str, str] = field(default_factory=dict)
    numbered: Mapping[str, tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=dict)

    @cached_property
    def _flat(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.sizes:
            part, rest = split_component(path)
            ways = [rest] if path not in self.other else [self.other[path], rest]
            # A list without parts is of one model, whatever part of a pipeline a file takes it for.
            prefixes = (
                self.prefixes.get(part, ()) if part else {p for ps in self.prefixes.values() for p in ps}
            )
            keys = {f"{prefix}_{flattened(way)}" for prefix in prefixes for way in ways}
            for key in keys | {f"{WHOLE_MODEL}_{flattened(path)}"}:
                found.setdefault(key, []).append(path)
        return found

    def path(self, flat: str) -> str | None:
        """The path of a flattened name, or None.

        Raises:
            AdapterFileError: It is the name of several layers.
        """
        found = self._flat.get(flat, [])
        if len(found) > 1:
            raise AdapterFileError(
                f"{flat!r} may be any of {listing(found)}: they are one and the same without their dots."
            )
        return found[0] if found else None

    def near(self, flat: str) -> str:
        """A hint at names like this one."""
        return near_matches(flat, self._flat, n=2)

    def flat(self, path: str, default: str) -> str:
        """What kohya calls a layer; ``default`` if the list does not say otherwise."""
        part, _ = split_component(path)
        prefixes = self.prefixes.get(part, ())
        if path not in self.sizes or not prefixes:
            return default
        return f"{prefixes[0]}_{flattened(self.other.get(path, split_component(path)[1]))}"


def split_component(path: str) -> tuple[str, str]:
    """``"unet.conv_in"`` as ``("unet", "conv_in")``; the first is empty for a path in one model."""
    first, dot, rest = path.partition(".")
    return (first, rest) if dot and first in COMPONENTS else ("", path)


def flattened(path: str) -> str:
    """A path with underscores for its dots."""
    return path.replace(".", "_")


def read_names(entries: Sequence[str]) -> Names:
    """One list from what a user named.

    Args:
        entries: Each the name of a built-in list, or a file: text with a path a line, JSON with a list of paths, or a
            model's ``.safetensors`` (its header alone is read). ``part=FILE`` puts ``part.`` before each path.

    Raises:
        AdapterFileError: An entry is neither, or the file is damaged.
    """
    from lorakit.io.formats.architectures import ARCHITECTURES

    sizes: dict[str, Size] = {}
    for entry in entries:
        if entry in ARCHITECTURES:
            if len(entries) > 1:
                raise AdapterFileError(f"The built-in list {entry!r} is whole: name it alone.")
            return ARCHITECTURES[entry]()
        part, equals, rest = entry.partition("=")
        part, file = (part, Path(rest)) if equals and part in COMPONENTS else ("", Path(entry))
        if not file.is_file():
            hint = near_matches(entry, ARCHITECTURES)
            raise AdapterFileError(
                f"{entry!r} is neither a file nor a built-in list of layers ({listing(ARCHITECTURES)}).{hint}"
            )
        for path, size in _listed(file):
            sizes[f"{part}.{path}" if part else path] = size
    return Names(" and ".join(entries), sizes)


def _listed(file: Path) -> Iterable[tuple[str, Size]]:
    if file.suffix == ".safetensors":
        return [
            (key.removesuffix(".weight"), size)
            for key, size in _header_sizes(file).items()
            if key.endswith(".weight") and len(size) > 1
        ]
    try:
        text = file.read_bytes().decode("utf-8")
        paths = json.loads(text) if file.suffix == ".json" else text.split()
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} holds no list of layers: {error}.") from error
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise AdapterFileError(f"{file} holds no list of layers: it must be a list of paths.")
    return [(path, ()) for path in paths]


def _header_sizes(file: Path) -> dict[str, Size]:
    with file.open("rb") as handle:
        whole = file.stat().st_size
        length = int.from_bytes(handle.read(8), "little")
        if whole < 10 or length > min(whole - 8, MOST_HEADER_BYTES):
            raise damaged(file, f"its header is said to be {length} bytes long, but the file has {whole}")
        entries, _ = parse_header(file, handle.read(length), whole - 8 - length)
    return {name: size for name, (_, size, _, _) in entries.items()}
