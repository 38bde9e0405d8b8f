"""diffusers' formats, with dots: today's (PEFT's factors), yesterday's (``lora.down``), the attention processors'.

None of them has an alpha in its tensors. Today's may carry one in the metadata (``lora_adapter_metadata``, PEFT's
settings for each part of the pipeline); where nothing says otherwise, alpha is the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.endings import smallest_pattern
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.io.formats.format import Format, Hints, Tensors, Written
from lorakit.io.formats.modules import ALPHA, DOWN, UP, plainest, read_module, scalar, write_module
from lorakit.io.formats.names import COMPONENTS, split_component
from lorakit.io.peft_keys import Found
from lorakit.io.peft_naming import number
from lorakit.io.peft_sites import Patterns
from lorakit.io.strictness import Complaints
from lorakit.methods import DoRA, LoRA

SETTINGS = "lora_adapter_metadata"
_MAGNITUDE = "lora_magnitude_vector"
_TENSORS = {"A": DOWN, "B": UP, "down": DOWN, "up": UP}
_TODAY = re.compile(r"(?P<path>.+)\.lora_(?P<what>[AB])(?:\.default)?\.weight")
_PLAIN = (
    _TODAY,
    re.compile(r"(?P<path>.+)\.lora\.(?P<what>down|up)\.weight"),
    re.compile(r"(?P<path>.+)\.lora_linear_layer\.(?P<what>down|up)\.weight"),
)
_PROCESSOR = re.compile(r"(?P<path>.+)\.processor\.(?P<leaf>\w+)_lora\.(?P<what>down|up)\.weight")
_OLD_ENCODER = re.compile(r"(?P<path>text_encoder.*)\.to_(?P<leaf>q|k|v|out)_lora\.(?P<what>down|up)\.weight")
_FIRST_WORDS = {
    "unet": ("down_blocks", "up_blocks", "mid_block"),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
}
"""How the paths of a file without parts start, and which part that is."""


def recognises(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether any key is a factor of a layer in a part of a pipeline."""
    firsts = {*COMPONENTS, *(word for words in _FIRST_WORDS.values() for word in words)}
    return any(key.partition(".")[0] in firsts and _taken_apart(key) is not None for key in tensors)


def read(tensors: Tensors, metadata: Mapping[str, str], hints: Hints) -> AdapterState:
    """An adapter from any of the three.

    Raises:
        AdapterFileError: A key is of none of them, or the tensors are not those of whole layers.
    """
    complaints = Complaints(list(tensors), "diffusers writes")
    groups: dict[str, dict[str, Found]] = {}
    for key, tensor in tensors.items():
        apart = _taken_apart(key)
        path = None if apart is None else _in_part(apart[0])
        if apart is None or path is None:
            complaints.unexpected.append(key)
            continue
        group = groups.setdefault(path, {})
        if apart[1] in group:
            raise AdapterFileError(f"{key!r} and {group[apart[1]].key!r} are the same factor of {path!r}.")
        group[apart[1]] = Found(key, tensor)
    complaints.check()
    settings = _settings(metadata)
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for path, group in groups.items():
        magnitude = group.pop(_MAGNITUDE, None)
        made = read_module(path, path, group, (), complaints)
        if made is None:
            continue
        method, shapes[path], held[path] = made
        assert isinstance(method, LoRA)
        method = _with_alpha(method, path, group, settings)
        if magnitude is not None:
            if magnitude.tensor.numel() != shapes[path].out:
                size = tuple(magnitude.tensor.shape)
                complaints.misshaped.append(f"{magnitude.key} is {size}, not ({shapes[path].out},)")
                continue
            held[path]["magnitude"] = magnitude.tensor.reshape(shapes[path].out)
            methods[path] = DoRA(inner=method)
        else:
            methods[path] = method
    complaints.check()
    return AdapterState(AdapterSpec(methods, shapes), held)


def _taken_apart(key: str) -> tuple[str, str] | None:
    """A key's path, and which tensor it is in the words of `lorakit.io.formats.modules`."""
    bare = key.removeprefix("base_model.model.")
    if match := _PROCESSOR.fullmatch(bare):
        leaf = {"to_out": "to_out.0"}.get(match["leaf"], match["leaf"])
        return f"{match['path']}.{leaf}", _TENSORS[match["what"]]
    if match := _OLD_ENCODER.fullmatch(bare):
        return f"{match['path']}.{match['leaf']}_proj", _TENSORS[match["what"]]
    for pattern in _PLAIN:
        if match := pattern.fullmatch(bare):
            return match["path"], _TENSORS[match["what"]]
    for ending, what in ((".alpha", ALPHA), (f".{_MAGNITUDE}", _MAGNITUDE)):
        if bare.endswith(ending):
            return bare.removesuffix(ending), what
    return None


def _in_part(path: str) -> str | None:
    """A path that starts with a part of a pipeline; None when it is not clear which."""
    if split_component(path)[0]:
        return path
    first = path.partition(".")[0]
    return next((f"{part}.{path}" for part, words in _FIRST_WORDS.items() if first in words), None)


# ---- alpha
def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings for each part."""
    text = metadata.get(SETTINGS)
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        settings: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            part, _, name = key.partition(".")
            settings.setdefault(part, {})[name] = value
        for values in settings.values():
            float(values.get("lora_alpha", 1))
            values["alpha_pattern"] = Patterns(values.get("alpha_pattern") or {}, values.get("lora_alpha"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(
            f"{SETTINGS} in the metadata is not as diffusers writes it: {error}."
        ) from error
    return settings


def _with_alpha(
    lora: LoRA, path: str, group: Mapping[str, Found], settings: Mapping[str, Mapping[str, Any]]
) -> LoRA:
    part, rest = split_component(path)
    said = settings.get(part)
    if said is None or "lora_alpha" not in said:
        return lora
    try:
        alpha = said["alpha_pattern"][rest]
    except ConfigError as error:
        raise AdapterFileError(f"{SETTINGS} in the metadata makes no sense: {error}") from error
    if ALPHA in group and scalar(group[ALPHA]) != alpha:
        raise AdapterFileError(
            f"{group[ALPHA].key} is {scalar(group[ALPHA])}, and {SETTINGS} says {alpha} for {path!r}."
        )
    return replace(lora, alpha=float(alpha), scaling="rslora" if said.get("use_rslora") else "lora")


# ---- writing
def write(state: AdapterState, hints: Hints) -> Written:
    """Today's form, with PEFT's settings of each part in the metadata.

    Raises:
        AdapterFileError: The format cannot hold it.
    """
    losses: list[str] = []
    tensors: dict[str, Tensor] = {}
    for path, method, shape, p in _loras(state, losses):
        rest = write_module(path, method, shape, p)
        if method.alpha != method.r:
            losses.append(
                "alpha, for diffusers before 0.35, which does not read the metadata and takes it for r"
            )
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = rest[DOWN], rest[UP]
        if "magnitude" in p:
            ones = (1,) * len(shape.kernel)
            size = (1, shape.out, *ones) if ones else (shape.out,)
            tensors[f"{path}.{_MAGNITUDE}"] = p["magnitude"].reshape(size)
    metadata = {"format": "pt", SETTINGS: json.dumps(_described(state), sort_keys=True, indent=2)}
    return Written(tensors, metadata, list(dict.fromkeys(losses)))


def _described(state: AdapterState) -> dict[str, Any]:
    described: dict[str, Any] = {}
    parts = dict.fromkeys(split_component(path)[0] for path in state.spec.methods)
    loras = {path: (method, p) for path, method, _, p in _loras(state, [])}
    for part in parts:
        inside = {
            p.removeprefix(f"{part}."): m for p, (m, _) in loras.items() if split_component(p)[0] == part
        }
        r, rank_pattern = smallest_pattern({path: lora.r for path, lora in inside.items()})
        alpha, alpha_pattern = smallest_pattern({path: number(lora.alpha) for path, lora in inside.items()})
        values = {
            "alpha_pattern": alpha_pattern,
            "lora_alpha": alpha,
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": rank_pattern,
            "target_modules": sorted(inside),
            "use_dora": any(
                "magnitude" in p for path, (_, p) in loras.items() if split_component(path)[0] == part
            ),
        }
        described |= {f"{part}.{key}": value for key, value in values.items()}
    return described


def _write_old(state: AdapterState, hints: Hints) -> Written:
    """``lora.down`` and ``lora_linear_layer.down``, with the scale in the factors: this form has none."""
    return _without_alpha(state, _yesterday)


def _write_processors(state: AdapterState, hints: Hints) -> Written:
    """The attention processors' form: attention of the UNet, and nothing else."""
    return _without_alpha(state, _of_processor)


def _without_alpha(state: AdapterState, start: Any) -> Written:
    losses: list[str] = []
    tensors: dict[str, Tensor] = {}
    for path, method, shape, p in _loras(state, losses):
        if "magnitude" in p:
            raise AdapterFileError(f"{path!r} is DoRA, and this form of diffusers' has no magnitudes.")
        B = scaled(path, p["lora_B"], method, losses)
        rest = write_module(path, method, shape, {**p, "lora_B": B})
        tensors[f"{start(path)}.down.weight"], tensors[f"{start(path)}.up.weight"] = rest[DOWN], rest[UP]
    return Written(tensors, {"format": "pt"}, list(dict.fromkeys(losses)))


def scaled(path: str, B: Tensor, method: LoRA, losses: list[str]) -> Tensor:
    """``B`` with the scale in it, for a form that has no alpha."""
    if method.scale == 1:
        return B
    product = (B.double() * method.scale).to(B.dtype)
    exact = bool((product.double() == B.double() * method.scale).all())
    rounded = "" if exact else ", rounded once"
    losses.append(f"alpha: this form has none, so the scale is multiplied into the factors{rounded}")
    return product


def _yesterday(path: str) -> str:
    return f"{path}.lora_linear_layer" if path.startswith("text_encoder") else f"{path}.lora"


def _of_processor(path: str) -> str:
    owner, _, leaf = path.removesuffix(".to_out.0" if path.endswith(".to_out.0") else "").rpartition(".")
    if path.endswith(".to_out.0"):
        owner, leaf = path.removesuffix(".to_out.0"), "to_out"
    if not path.startswith("unet.") or leaf not in ("to_q", "to_k", "to_v", "to_out") or ".attn" not in owner:
        raise AdapterFileError(
            f"{path!r} is no projection of an attention in the UNet, and attention processors hold nothing else: "
            "write diffusers' later form (--to diffusers)."
        )
    return f"{owner}.processor.{leaf}_lora"


def _loras(state: AdapterState, losses: list[str]) -> list[tuple[str, LoRA, Shape, Mapping[str, Tensor]]]:
    """Every target as a LoRA, of DoRA the inner one (``magnitude`` is among the tensors then)."""
    plain = state.plain()
    found: list[tuple[str, LoRA, Shape, Mapping[str, Tensor]]] = []
    for path, method in plain.spec.methods.items():
        if not split_component(path)[0]:
            raise AdapterFileError(
                f"{path!r} is in no part of a pipeline, and diffusers' paths start with one: say which (--under unet)."
            )
        shape = plain.spec.shapes[path]
        method, p = plainest(path, method, shape, plain.parameters(path), losses)
        inner = method.inner if isinstance(method, DoRA) else method
        if not isinstance(inner, LoRA):
            raise AdapterFileError(
                f"{path!r} is adapted by {inner.name}; diffusers' own formats hold LoRA and DoRA."
            )
        if inner.scaling != "lora":
            inner = replace(inner, alpha=inner.scale * inner.r, scaling="lora")
        found.append((path, inner, shape, p))
    return found


def _recognises_old(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    return recognises(tensors, metadata) and not any(_TODAY.fullmatch(key) for key in tensors)


def _recognises_processors(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    return recognises(tensors, metadata) and any(_PROCESSOR.fullmatch(key) for key in tensors)


DIFFUSERS = Format("diffusers", "diffusers today: PEFT's factors by part", recognises, read, write)
DIFFUSERS_OLD = Format(
    "diffusers-old", "diffusers before PEFT: `lora.down`", _recognises_old, read, _write_old
)
DIFFUSERS_PROCESSORS = Format(
    "diffusers-processors", "diffusers' attention processors", _recognises_processors, read, _write_processors
)
