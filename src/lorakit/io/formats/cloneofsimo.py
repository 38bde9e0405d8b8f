"""cloneofsimo/lora's format: numbered factors ``unet:7:down``, ranks in the metadata, learnt tokens beside them.

The numbers follow the order in which that program walked through the model: a list of the layers in that order turns
them into paths. It has no alpha: the scale is 1. A learnt token is a vector under its own name, such as ``<s1>``; the
program adds it to the tokenizer, so its row comes after those of CLIP's vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, listing
from lorakit.io.formats.architectures import sd2, sd15
from lorakit.io.formats.diffusers import scaled
from lorakit.io.formats.format import Format, Hints, Tensors, Written
from lorakit.io.formats.modules import DOWN, UP, plainest, read_module, write_module
from lorakit.io.formats.names import Names, split_component
from lorakit.io.peft_keys import Found
from lorakit.io.strictness import Complaints
from lorakit.methods import LoRA, TokenRows

_FACTOR = re.compile(r"(\w+):(0|[1-9]\d{0,5}):(up|down)")
_EMBEDDED = "<embed>"
_VOCABULARY = 49408
_TABLE = "text_encoder.text_model.embeddings.token_embedding"


def recognises(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether any key is a numbered factor."""
    return any(_FACTOR.fullmatch(key) for key in tensors)


def read(tensors: Tensors, metadata: Mapping[str, str], hints: Hints) -> AdapterState:
    """An adapter from numbered factors.

    Raises:
        AdapterFileError: The numbers are not those of the layers known, or a tensor does not fit.
    """
    complaints = Complaints(list(tensors), "its numbers and ranks describe")
    numbered: dict[str, dict[int, dict[str, Found]]] = {}
    tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            of = numbered.setdefault(match[1], {}).setdefault(int(match[2]), {})
            of[UP if match[3] == "up" else DOWN] = Found(key, tensor)
        elif metadata.get(key) == _EMBEDDED:
            tokens[key] = tensor
        else:
            complaints.unexpected.append(key)
    complaints.check()
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for part, groups in sorted(numbered.items()):
        paths, sizes = _order(part, groups, metadata, hints)
        for at in sorted(groups):
            made = read_module(f"{part}:{at}", paths[at], groups[at], sizes.get(paths[at], ()), complaints)
            if made is None:
                continue
            method, shapes[paths[at]], held[paths[at]] = made
            assert isinstance(method, LoRA)
            said = metadata.get(f"{part}:{at}:rank")
            if said is not None and said != str(method.r):
                complaints.misshaped.append(f"{part}:{at} has rank {method.r}; the metadata says {said[:20]}")
            methods[paths[at]] = method
    complaints.check()
    info: dict[str, Any] = {}
    kinds = {part: json.loads(metadata[part]) for part in sorted(numbered) if part in metadata}
    if kinds:
        info["cloneofsimo"] = {"kinds": {part: sorted(names) for part, names in kinds.items()}}
    if tokens:
        methods[_TABLE], shapes[_TABLE], held[_TABLE] = _token_rows(tokens)
        ids = range(_VOCABULARY, _VOCABULARY + len(tokens))
        info["tokens"] = dict(zip(sorted(tokens), ids, strict=True))
    return AdapterState(AdapterSpec(methods, shapes, info=info), held)


def _order(
    part: str, groups: Mapping[int, Mapping[str, Found]], metadata: Mapping[str, str], hints: Hints
) -> tuple[tuple[str, ...], Mapping[str, tuple[int, ...]]]:
    """The paths that the numbers of a part mean, and the sizes of those layers."""
    text = metadata.get(part)
    try:
        kinds = None if text is None else frozenset(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{part!r} in the metadata is no list of kinds of blocks: {error}.") from error
    given = [_listed(hints.names, part)] if hints.names is not None else []
    for names in [hints.names] if hints.names is not None else [sd15(), sd2()]:
        known_kinds, paths = names.numbered.get(part, (frozenset(), ()))
        if kinds is None or kinds == known_kinds:
            given.append((paths, names.sizes))
    wanted = set(range(len(groups)))
    for paths, sizes in given:
        if len(paths) == len(groups) and set(groups) == wanted and _fits(paths, sizes, groups):
            return paths, sizes
    counts = listing([str(len(paths)) for paths, _ in given]) or "none"
    raise AdapterFileError(
        f"The file has {len(groups)} numbered layers of {part!r} (of {sorted(kinds) if kinds else 'kinds unsaid'}), "
        f"and no list of layers here fits them (layers listed: {counts}). Give the paths in the program's order: "
        f"--names {part}=FILE with a path a line."
    )


def _listed(names: Names, part: str) -> tuple[tuple[str, ...], Mapping[str, tuple[int, ...]]]:
    return tuple(path for path in names.sizes if split_component(path)[0] == part), names.sizes


def _fits(
    paths: tuple[str, ...], sizes: Mapping[str, tuple[int, ...]], groups: Mapping[int, Mapping[str, Found]]
) -> bool:
    """Whether the inputs of all layers are as many as the factors have."""
    for at, path in enumerate(paths):
        size, down = sizes.get(path, ()), groups[at].get(DOWN)
        if size and down is not None and tuple(down.tensor.shape[1:]) != size[1:]:
            return False
    return True


def _token_rows(tokens: Mapping[str, Tensor]) -> tuple[Method, Shape, dict[str, Tensor]]:
    rows = [tokens[name] for name in sorted(tokens)]
    if len({(t.dtype, tuple(t.shape)) for t in rows}) != 1 or rows[0].dim() != 1 or not rows[0].numel():
        raise AdapterFileError(
            f"The learnt tokens {listing(sorted(tokens))} are not vectors of one size and dtype."
        )
    ids = tuple(range(_VOCABULARY, _VOCABULARY + len(rows)))
    shape = Shape("embedding", out=rows[0].numel(), in_=_VOCABULARY + len(rows))
    return TokenRows(ids), shape, {"rows": torch.stack(rows)}


def write(state: AdapterState, hints: Hints) -> Written:
    """Numbered factors of an adapter.

    Raises:
        AdapterFileError: The format cannot hold it: it knows whole parts only.
    """
    losses: list[str] = []
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    rest = dict.fromkeys(state.spec.methods)
    plain = state.plain()
    if isinstance(plain.spec.methods.get(_TABLE), TokenRows):
        rest.pop(_TABLE)
        names = _token_names(plain)
        tensors |= dict(zip(names, plain.tensors[_TABLE]["rows"].unbind(), strict=True))
        metadata |= dict.fromkeys(names, _EMBEDDED)
    for part in dict.fromkeys(split_component(path)[0] for path in rest):
        paths, kinds = _whole_part(part, [p for p in rest if split_component(p)[0] == part], hints)
        if kinds:
            metadata[part] = json.dumps(sorted(kinds))
        for at, path in enumerate(paths):
            shape = plain.spec.shapes[path]
            method, p = plainest(path, plain.spec.methods[path], shape, plain.parameters(path), losses)
            if not isinstance(method, LoRA):
                raise AdapterFileError(
                    f"{path!r} is adapted by {method.name}; cloneofsimo's format holds LoRA."
                )
            B = scaled(path, p["lora_B"], method, losses)
            made = write_module(path, method, shape, {**p, "lora_B": B})
            tensors[f"{part}:{at}:down"], tensors[f"{part}:{at}:up"] = made[DOWN], made[UP]
            metadata[f"{part}:{at}:rank"] = str(method.r)
    return Written(tensors, metadata, list(dict.fromkeys(losses)))


def _token_names(state: AdapterState) -> list[str]:
    method = state.spec.methods[_TABLE]
    assert isinstance(method, TokenRows)
    names = {at: name for name, at in state.spec.info.get("tokens", {}).items()}
    unnamed = [str(at) for at in method.ids if at not in names]
    if unnamed:
        raise AdapterFileError(
            f"cloneofsimo's format keeps learnt tokens by name, and info['tokens'] names none for {listing(unnamed)}."
        )
    return [names[at] for at in method.ids]


def _whole_part(part: str, paths: list[str], hints: Hints) -> tuple[tuple[str, ...], frozenset[str]]:
    """All layers of a part in the program's order."""
    choices: list[tuple[tuple[str, ...], frozenset[str]]] = []
    if hints.names is not None:
        choices.append((_listed(hints.names, part)[0], frozenset()))
    for names in [hints.names] if hints.names is not None else [sd15(), sd2()]:
        kinds, numbered = names.numbered.get(part, (frozenset(), ()))
        choices.append((numbered, kinds))
    for order, kinds in choices:
        if order and set(order) == set(paths):
            return order, kinds
    nearest = min(
        (order for order, _ in choices if order), key=lambda o: len(set(o) ^ set(paths)), default=()
    )
    raise AdapterFileError(
        f"cloneofsimo's format numbers all layers of a part, and the adapter's targets in {part or 'no part'!r} are "
        f"others than those of the lists here: {len(set(nearest) - set(paths))} missing, "
        f"{len(set(paths) - set(nearest))} not numbered ({listing(sorted(set(paths) - set(nearest)), most=3)})."
    )


CLONEOFSIMO = Format(
    "cloneofsimo", "cloneofsimo/lora: numbered factors, learnt tokens", recognises, read, write
)
