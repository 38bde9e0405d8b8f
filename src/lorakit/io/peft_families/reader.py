"""From the configuration and the tensors of one of PEFT's types beside LoRA to an `AdapterState`: strict."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_config import SELECTION, check_settings, kept_settings, settings_error
from lorakit.io.peft_families.family import Family, PathSettings
from lorakit.io.peft_keys import Found, Keys, bare_keys
from lorakit.io.peft_rules import natural
from lorakit.io.peft_whole import read_whole_parameters
from lorakit.io.strictness import Complaints, floating


def read_family(
    family: Family,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    embedded: Embedded | None = None,
    outline: Outline | None = None,
    ignore: Collection[str] = (),
) -> AdapterState:
    """The adapter that a configuration and tensors of this type describe.

    Raises:
        AdapterFileError: A setting cannot be honoured, or a tensor is missing, unexpected or of another size.
    """
    config = check_settings(raw, family.defaults, family.refused, ignore)
    _check_types(config)
    if not tensors:
        raise AdapterFileError("The adapter's file holds no tensors.")
    keys, shared = _sort(family, tensors)
    complaints = Complaints([found.key for group in keys.factors.values() for found in group.values()])
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    own: dict[str, dict[str, Tensor]] = {}
    try:
        patterns = PathSettings(config)
        for path in sorted(keys.factors, key=natural):
            group = keys.factors[path]
            values = {name: floating(found.key, found.tensor) for name, found in group.items()}
            method = family.method_at(path, config, patterns)
            known = _known(path, embedded, outline)
            try:
                shape = family.shape_at(path, method, values, known)
            except (KeyError, IndexError):
                complaints.missing += [f"{path}.{name}" for name in _first_form(family) if name not in group]
                continue
            method = family.for_shape(method, shape)
            if shared:
                method = family.completed(method, shared)
            sizes = method.shapes(shape)
            want = family.in_file(method, sizes, shape)
            if complaints.fits(path, want, group):
                methods[path], shapes[path] = method, shape
                own[path] = {name: values[name].reshape(sizes[name]) for name in sizes}
        if family.shared and not shared and methods:
            shared = family.start_shared(methods, shapes)
            methods = {path: family.completed(method, shared) for path, method in methods.items()}
        whole = read_whole_parameters(keys, {**config, "bias": _bias(family, config)})
    except ConfigError as error:
        raise settings_error(error) from error
    for path, method, shape, found in whole.targets:
        methods[path], shapes[path] = method, shape
        own[path] = {"value": floating(found.key, found.tensor).reshape(method.shapes(shape)["value"])}
    complaints.unexpected += whole.unexpected
    complaints.missing += whole.missing
    if not keys.factors:
        complaints.missing.append(f"the tensors of every target ({', '.join(family.names)})")
    complaints.check()
    spec = AdapterSpec(
        methods, shapes, config["base_model_name_or_path"], _info(family, config, whole.tables)
    )
    return AdapterState(spec, own, shared)


def _sort(family: Family, tensors: Mapping[str, Tensor]) -> tuple[Keys, dict[str, Tensor]]:
    """The targets' tensors, the other ones, and those that all targets share."""
    target = re.compile(rf"(.+)\.({'|'.join(map(re.escape, family.names))})(?:\.([^.]+))?")
    common = re.compile(
        rf"(?:base_model\.)?({'|'.join(map(re.escape, family.shared)) or '(?!)'})(?:\.([^.]+))?"
    )
    keys, shared, own = Keys(), {}, {}
    for key, tensor in tensors.items():
        if match := common.fullmatch(key):
            shared[match[1]] = floating(key, tensor)
        else:
            own[key] = tensor
    for key, bare, tensor in bare_keys(own.items()):
        if match := target.fullmatch(bare):
            keys.put(match[1], match[2], Found(key, tensor))
            if match[3] is not None:
                keys.adapters.add(match[3])
        else:
            keys.put_other(bare, Found(key, tensor))
    keys.check_one_adapter()
    if shared and set(shared) != set(family.shared):
        lacking = sorted(set(family.shared) - set(shared))
        raise AdapterFileError(f"The file has {', '.join(sorted(shared))} and not {', '.join(lacking)}.")
    return keys, shared


def _known(path: str, embedded: Embedded | None, outline: Outline | None) -> Shape | None:
    """What our own file, or the model, says of a target."""
    if embedded is not None and path in embedded.shapes:
        kind, out, in_, kernel = embedded.shapes[path]
        return Shape(kind, out=out, in_=in_, kernel=tuple(kernel))
    return None if outline is None else outline.layer(path)


def _first_form(family: Family) -> tuple[str, ...]:
    """The tensors that a target has in the plainest form of the type."""
    return tuple(name for name in family.names if "_t" not in name)


def _bias(family: Family, config: Mapping[str, Any]) -> str:
    word = config.get("bias", "none")
    return "lora_only" if word == family.bias_word else str(word)


def _check_types(config: Mapping[str, Any]) -> None:
    for key, types in (("modules_to_save", (list, type(None))), ("target_modules", (str, list, type(None)))):
        if not isinstance(config[key], types):
            raise AdapterFileError(
                f"adapter_config.json has {key}={config[key]!r}, which is no value for it."
            )


def _info(family: Family, config: Mapping[str, Any], tables: list[str]) -> dict[str, Any]:
    """What is not in the methods and would be lost: kept settings, and how the targets were named."""
    peft = kept_settings(config, family.kept, family.defaults)
    for key in (*SELECTION, "modules_to_save", "feedforward_modules", "init_weights"):
        if config.get(key) not in (None, [], True):
            peft[key] = config[key]
    if tables:
        peft["whole_tables"] = tables
    return {"peft": peft} if peft else {}
