"""kohya's format (sd-scripts) and LyCORIS's: flattened names, ``lora_unet_...lora_down.weight``, an alpha each.

The file has no dots in the names of layers, so it is read with a list of the model's layers, see
`lorakit.io.formats.names`. A file that we write carries its own under ``lorakit.targets`` in the metadata, which others
leave alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, listing
from lorakit.io.formats.architectures import ARCHITECTURES
from lorakit.io.formats.format import Format, Hints, Tensors, Written
from lorakit.io.formats.modules import DOWN, NOT_READ, SUFFIXES, plainest, read_module, write_module
from lorakit.io.formats.names import PREFIXES, WHOLE_MODEL, Names, Size, flattened, split_component
from lorakit.io.peft_keys import Found
from lorakit.io.strictness import Complaints

TARGETS = "lorakit.targets"
_KNOWN = (*SUFFIXES, *NOT_READ)
_STARTS = tuple(sorted({f"{prefix}_" for prefixes in PREFIXES.values() for prefix in prefixes}))


def recognises(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether any key starts as kohya's or LyCORIS's do and ends in one of their tensors."""
    return any(key.startswith(_STARTS) and key.partition(".")[2] in _KNOWN for key in tensors)


def read(tensors: Tensors, metadata: Mapping[str, str], hints: Hints) -> AdapterState:
    """An adapter from kohya's tensors.

    Raises:
        AdapterFileError: A name is in no list, or the tensors are not those of whole layers.
    """
    groups: dict[str, dict[str, Found]] = {}
    complaints = Complaints(list(tensors), "kohya and LyCORIS write")
    for key, tensor in tensors.items():
        stem, _, suffix = key.partition(".")
        if suffix in _KNOWN and key.startswith(_STARTS):
            groups.setdefault(stem, {})[suffix] = Found(key, tensor)
        else:
            complaints.unexpected.append(key)
    complaints.check()
    paths, sizes = _resolved(groups, metadata, hints)
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for stem, group in groups.items():
        path = paths[stem]
        if path in methods:
            raise AdapterFileError(f"{stem!r} and another name both mean {path!r}.")
        made = read_module(stem, path, group, sizes.get(path, ()), complaints)
        if made is not None:
            methods[path], shapes[path], held[path] = made
    complaints.check()
    kept = {key: value for key, value in metadata.items() if key not in (TARGETS, "format")}
    info = {"kohya": kept} if kept else {}
    return AdapterState(AdapterSpec(methods, shapes, metadata.get("ss_sd_model_name"), info), held)


def write(state: AdapterState, hints: Hints, *, whole_model: bool = False) -> Written:
    """Kohya's tensors of an adapter.

    Raises:
        AdapterFileError: The format cannot hold it.
    """
    paths = list(state.spec.methods)
    named = hints.names
    written: dict[str, Tensor] = {}
    stems: dict[str, dict[str, Any]] = {}
    losses: list[str] = []
    plain = state.plain()
    for path, method in plain.spec.methods.items():
        shape = plain.spec.shapes[path]
        method, p = plainest(path, method, shape, plain.parameters(path), losses)
        stem = _stem(path, paths, whole_model)
        stem = named.flat(path, stem) if named is not None and not whole_model else stem
        if stem in stems:
            raise AdapterFileError(
                f"{path!r} and {stems[stem]['path']!r} are both {stem!r} without their dots: the format cannot tell "
                "them apart."
            )
        stems[stem] = {"path": path, "size": [shape.out, shape.channels, *shape.kernel]}
        written |= {f"{stem}.{rest}": t for rest, t in write_module(path, method, shape, p).items()}
    kept = state.spec.info.get("kohya", {})
    metadata = {**kept, "format": "pt", TARGETS: json.dumps(stems, separators=(",", ":"), sort_keys=True)}
    if state.spec.base:
        metadata.setdefault("ss_sd_model_name", state.spec.base)
    return Written(written, metadata, list(dict.fromkeys(losses)))


def _stem(path: str, paths: list[str], whole_model: bool) -> str:
    part, rest = split_component(path)
    if whole_model:
        return f"{WHOLE_MODEL}_{flattened(path)}"
    if not part:
        raise AdapterFileError(
            f"{path!r} is in no part of a pipeline, and kohya's names start with one. Say which (--under unet), or "
            "write LyCORIS's names for a whole model (--to lycoris)."
        )
    alone = not any(p.startswith(("text_encoder_2.", "text_encoder_3.", "transformer.")) for p in paths)
    prefixes = PREFIXES[part]
    prefix = prefixes[0] if len(prefixes) == 1 or alone else prefixes[1]
    return f"{prefix}_{flattened(rest)}"


# ---- which layer a name means
def _resolved(
    groups: Mapping[str, Mapping[str, Found]], metadata: Mapping[str, str], hints: Hints
) -> tuple[dict[str, str], Mapping[str, Size]]:
    """Each name's path, and the sizes of the layers that are known."""
    if hints.names is not None:
        return _all(groups, hints.names), hints.names.sizes
    if TARGETS in metadata:
        own = _own(metadata[TARGETS])
        if set(own) == set(groups):
            return {s: p for s, (p, _) in own.items()}, dict(own.values())
    found: list[tuple[int, int, int, Names]] = []
    for make in ARCHITECTURES.values():
        names = make()
        missing = [stem for stem in groups if names.path(stem) is None]
        found.append((len(missing), sum(_misfit(names, s, g) for s, g in groups.items()), len(found), names))
    missing_count, _, _, best = min(found, key=lambda item: item[:3])
    if missing_count == len(groups):
        raise AdapterFileError(
            f"The file has names without dots, such as {next(iter(groups))!r}, and none of them is in a list of "
            f"layers here ({listing(ARCHITECTURES)}). Name the model's layers: --names FILE with a path a line, or "
            "--names unet=model.safetensors."
        )
    return _all(groups, best), best.sizes


def _misfit(names: Names, stem: str, group: Mapping[str, Found]) -> bool:
    """Whether a layer of that name has another number of inputs in this model."""
    path = names.path(stem)
    size = names.sizes.get(path or "", ())
    return bool(size) and DOWN in group and tuple(group[DOWN].tensor.shape[1:2]) != size[1:2]


def _all(groups: Mapping[str, Any], names: Names) -> dict[str, str]:
    paths = {stem: names.path(stem) for stem in groups}
    lost = [stem for stem, path in paths.items() if path is None]
    if lost:
        raise AdapterFileError(
            f"{len(lost)} of {len(groups)} names are not those of a layer of {names.title}: {listing(lost)}."
            f"{names.near(lost[0])} A name without dots can only be looked up: name the model's layers with --names "
            "(a file with a path a line, or the model's .safetensors)."
        )
    return {stem: path for stem, path in paths.items() if path is not None}


def _own(text: str) -> dict[str, tuple[str, Size]]:
    try:
        entries = json.loads(text)
        own = {stem: (entry["path"], tuple(entry["size"])) for stem, entry in entries.items()}
        sound = all(
            isinstance(path, str) and all(type(n) is int and n > 0 for n in size)
            for path, size in own.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(
            f"{TARGETS} in the metadata is not as lorakit writes it: {error!r}."
        ) from error
    if not sound:
        raise AdapterFileError(f"{TARGETS} in the metadata is not as lorakit writes it.")
    return own


def _write_lycoris(state: AdapterState, hints: Hints) -> Written:
    return write(state, hints, whole_model=True)


def _is_lycoris(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    return recognises(tensors, metadata) and any(key.startswith(f"{WHOLE_MODEL}_") for key in tensors)


KOHYA = Format("kohya", "kohya's sd-scripts: LoRA, LoCon, LoHa, LoKr, DoRA", recognises, read, write)
LYCORIS = Format("lycoris", "LyCORIS for any model (prefix `lycoris_`)", _is_lycoris, read, _write_lycoris)
