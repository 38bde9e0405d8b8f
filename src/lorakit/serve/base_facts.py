"""What a store knows of the base model, and whether an adapter belongs to it: by sizes, target for target."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lorakit.core.adapter import AdapterState
from lorakit.core.selection import split_part
from lorakit.core.target import Shape, Target
from lorakit.errors import (
    AdapterBaseMismatchError,
    AdapterIncompatibleError,
    ConfigError,
    listing,
    near_matches,
)
from lorakit.io.model_outline import outline_of
from lorakit.io.outline import Outline
from lorakit.targets.recognise import candidates

_WEIGHT_FILES = ("*.safetensors", "*.gguf")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BaseFacts:
    """A base model as data.

    Attributes:
        outline: Its parameters and their sizes.
        layers: The layers that can be adapted, with their true sizes also where the weight is kept quantised.
        digest: `digest_of_weights` of its folder; None where nobody needs it.
        name: What it is called.
    """

    outline: Outline
    layers: Mapping[str, Shape] = field(default_factory=dict)
    digest: str | None = None
    name: str | None = None


def base_facts(model: nn.Module, *, digest: str | None = None, name: str | None = None) -> BaseFacts:
    """The facts of a model; the adapters on it are left out.

    Args:
        model: The base.
        digest: See `BaseFacts`.
        name: See `BaseFacts`; by default what transformers loaded it by.
    """
    layers = {path: t.shape for path, t in candidates(model).items() if isinstance(t, Target)}
    name = name or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return BaseFacts(outline_of(model), layers, digest, name)


def digest_of_weights(folder: Path | str) -> str:
    """SHA-256 in hex over the weight files of a base model (``*.safetensors``, ``*.gguf``) and their names.

    Args:
        folder: The model's folder, or one file.

    Raises:
        ConfigError: There are no weights.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(p for kind in _WEIGHT_FILES for p in folder.glob(kind))
    if not files:
        raise ConfigError(f"{folder} holds no weights ({' or '.join(_WEIGHT_FILES)}) to take a digest of.")
    lines = [f"{digest_of_file(path)}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 in hex over the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_belongs(state: AdapterState, base: BaseFacts) -> None:
    """Check that every target of an adapter exists in the base, in its size. Names of models do not matter.

    Raises:
        AdapterBaseMismatchError: A target has another size, or none of them exists.
        AdapterIncompatibleError: Some targets do not exist.
    """
    missing, wrong = [], []
    for path, shape in state.spec.shapes.items():
        found = _size_at(path, shape, base)
        if found is None:
            missing.append(path)
        elif found:
            wrong.append(f"{path} is {shape} in the adapter and {found} in the base")
    made_for = f" (it says that it was made for {state.spec.base!r})" if state.spec.base else ""
    if wrong:
        raise AdapterBaseMismatchError(
            f"The adapter{made_for} does not fit this base: of {len(state.spec.shapes)} targets, {len(wrong)} have "
            f"another size: {listing(wrong, most=3)}."
        )
    if len(missing) == len(state.spec.shapes):
        raise AdapterBaseMismatchError(
            f"The adapter{made_for} is not for this base model, which has none of its targets: "
            f"{listing(missing, most=3)}.{near_matches(missing[0], base.layers, n=1)}"
        )
    if missing:
        raise AdapterIncompatibleError(
            f"The base model lacks {len(missing)} of the adapter's {len(state.spec.shapes)} targets: "
            f"{listing(missing)}.{near_matches(missing[0], base.layers, n=1)} Without them it would compute "
            "something else, so it is not served."
        )


def _size_at(path: str, shape: Shape, base: BaseFacts) -> str | None:
    """What the base has at a target if that is another size, an empty string if it fits, None if there is nothing."""
    whole, part = split_part(path)
    if shape.kind == "parameter":
        return _parameter_size(whole, shape, part, base)
    if shape.kind in ("attention", "model"):
        return _place_size(path, shape, base)
    if shape.kind == "module":
        return "" if path in base.outline.modules or not path else None
    have = base.layers.get(whole) or base.outline.layer(whole)
    if have is None:
        # A layer's own parameter as a target, or an attention's weight that is none of a layer.
        return _parameter_size(whole, shape, part, base)
    rows = shape.out <= have.out if part else shape.out in (0, have.out)
    same = (shape.batch, shape.lookup, shape.kernel) == (have.batch, have.lookup, have.kernel)
    return "" if rows and shape.in_ in (0, have.in_) and same else str(have)


def _parameter_size(path: str, shape: Shape, part: str, base: BaseFacts) -> str | None:
    size = base.outline.sizes.get(path)
    if size is None and f"{path}.weight" in base.outline.sizes:
        size = base.outline.sizes[f"{path}.weight"]
    if size is None:
        return None
    described = " x ".join(map(str, size))
    if shape.stored and not part:
        return "" if shape.stored == size else described
    count = math.prod(size)
    fits = shape.numel <= count if part else shape.numel in (0, count)
    return "" if fits else described


def _place_size(path: str, shape: Shape, base: BaseFacts) -> str | None:
    transformer = base.outline.transformer
    if transformer is None:
        return None
    if shape.kind == "model":
        return ""
    have = transformer.attentions.get(path)
    if have is None:
        return None
    return "" if shape.out in (0, have[0]) else str(have[0])
