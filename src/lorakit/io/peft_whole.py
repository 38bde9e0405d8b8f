"""Tensors of a PEFT file that stand in for the model's own: token rows, saved modules, biases, embedding tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, listing
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_keys import Found, Keys
from lorakit.io.peft_rules import HEADS, TABLES
from lorakit.io.peft_sites import unwrapped
from lorakit.methods import FullFineTuning, TokenRows

Target = tuple[str, Method, Shape, Found]
_COPY = re.compile(r"(.+)\.modules_to_save(?:\.default)?\.(.+)")
_ORIGINAL = re.compile(r"(.+)\.original_module\.(.+)")


def read_token_rows(
    keys: Keys, config: Mapping[str, Any], embedded: Embedded | None, outline: Outline | None
) -> list[Target]:
    """The token rows, with the ids from the configuration.

    The file does not say how many rows the whole table has: without an outline the shape's ``in_`` is 0, unknown.

    Raises:
        AdapterFileError: Ids and rows do not belong together.
    """
    indices = config["trainable_token_indices"]
    if not indices:
        if keys.rows:
            raise AdapterFileError(
                f"The file has token rows ({listing(f.key for f in keys.rows.values())}), but "
                "trainable_token_indices is not set."
            )
        return []
    if isinstance(indices, list):
        if len(keys.rows) != 1:
            raise AdapterFileError(
                "trainable_token_indices names tokens of the input embedding; the file has rows for "
                f"{len(keys.rows)} tables"
                f"{': ' + listing(keys.rows) if keys.rows else ''}."
            )
        ids_at = dict.fromkeys(keys.rows, indices)
    else:
        ids_at = {}
        for path in keys.rows:
            named = [entry for entry in indices if path.endswith(entry)]
            if not named:
                raise AdapterFileError(
                    f"The file has token rows for {path!r}; trainable_token_indices names {listing(indices)}."
                )
            ids_at[path] = indices[max(named, key=len)]
        for entry, ids in indices.items():  # a tied head's rows are kept once, with the embedding's
            if not any(path.endswith(entry) for path in keys.rows) and ids not in ids_at.values():
                raise AdapterFileError(
                    f"trainable_token_indices names {entry!r}, but the file has no token rows for it."
                )
    return [
        (path, TokenRows(tuple(ids_at[path])), _table_shape(path, found.tensor, embedded, outline), found)
        for path, found in keys.rows.items()
    ]


def _table_shape(path: str, rows: Tensor, embedded: Embedded | None, outline: Outline | None) -> Shape:
    width = rows.shape[-1] if rows.dim() else 0
    if embedded is not None and path in embedded.tables:
        kind, out, in_ = embedded.tables[path]
        return Shape(kind, out=out, in_=in_)
    if outline is not None and f"{path}.weight" in outline.sizes:
        count = outline.sizes[f"{path}.weight"][0]
        if path in outline.embeddings:
            return Shape("embedding", out=width, in_=count)
        return Shape("linear", out=count, in_=width)
    if path.rpartition(".")[2] in HEADS:
        return Shape("linear", out=0, in_=width)
    return Shape("embedding", out=width, in_=0)


@dataclass
class Whole:
    """Whole parameters.

    Attributes:
        targets: Those that the configuration, or PEFT's habit of saving tables, accounts for.
        tables: Paths that PEFT saved without a word in the configuration.
        unexpected: Keys that nothing accounts for.
        missing: What the configuration asks for in vain.
    """

    targets: list[Target] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_whole_parameters(keys: Keys, config: Mapping[str, Any]) -> Whole:
    """Every tensor that is neither a factor nor token rows, as full fine-tuning of one parameter.

    Raises:
        AdapterFileError: A parameter is there twice, with different values.
    """
    whole = Whole()
    entries = config["modules_to_save"] or []
    layers = {unwrapped(start, keys.factors)[0] for start in keys.factors} | set(keys.rows)
    wrappers = {*keys.factors, *keys.rows}
    chosen: dict[str, Found] = {}
    originals: list[tuple[str, Found]] = []
    for bare, found in keys.others.items():
        if match := _ORIGINAL.fullmatch(
            bare
        ):  # what the model computes with the adapter off: not the adapter's
            originals.append((f"{match[1]}.{match[2]}", found))
            continue
        if match := _COPY.fullmatch(bare):
            bare = f"{match[1]}.{match[2]}"
        wrapped = bare.replace(".token_adapter.base_layer.", ".base_layer.")
        owner, _, leaf = wrapped.rpartition(".")
        owner, inside = unwrapped(owner, wrappers)
        path = f"{owner}.{leaf}" if owner else leaf
        if path in chosen:
            if not torch.equal(chosen[path].tensor, found.tensor):
                raise AdapterFileError(
                    f"The file has {path!r} twice, as {chosen[path].key!r} and {found.key!r}, with "
                    "different values."
                )
            continue
        saved = any(module.endswith(entry) for entry in entries for module in _modules_of(path))
        if (
            saved
            or _is_trained_bias(leaf, owner, config["bias"], layers)
            or (inside and leaf in ("weight", "bias"))
        ):
            chosen[path] = found
        elif leaf in ("weight", "bias") and owner.rpartition(".")[2] in TABLES:
            chosen[path] = found
            whole.tables.append(path)
        else:
            whole.unexpected.append(found.key)
    whole.unexpected += [found.key for path, found in originals if path not in chosen]
    if entries and not any(m.endswith(e) for path in chosen for m in _modules_of(path) for e in entries):
        whole.missing.append(f"the modules_to_save ({listing(entries)})")
    whole.targets = [
        (path, FullFineTuning(), parameter_shape(found.tensor), found) for path, found in chosen.items()
    ]
    return whole


def parameter_shape(stored: Tensor) -> Shape:
    """A parameter as `ParameterTarget` sees it: a vector of n as ``n x 1``, anything else as a stack of matrices."""
    size = tuple(stored.shape)
    if len(size) >= 2:
        return Shape("parameter", out=size[-2], in_=size[-1], batch=size[:-2], stored=size)
    return Shape("parameter", out=size[0] if size else 1, in_=1, stored=size)


def _modules_of(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _is_trained_bias(leaf: str, owner: str, bias: str, layers: set[str]) -> bool:
    return leaf == "bias" and (bias == "all" or (bias == "lora_only" and owner in layers))
