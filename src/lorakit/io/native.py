"""Our own form, for what PEFT has no words for: the same two files, the whole spec as JSON, tensors as they are.

``adapter_config.json`` has ``peft_type`` ``"LORAKIT"``, which makes PEFT stop instead of loading something else, and
a section ``lorakit``: ``format`` (1), ``methods`` (each once), ``targets`` (path, index of the method,
shape), ``info``,
and ``why_not_peft``. Tensors stand under ``path|name`` in the matrix layout of `AdapterState`; those that all targets
share under ``*|name`` (the empty path is the model itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState, shared_shapes
from lorakit.core.method import Method
from lorakit.core.registry import method_from_json
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError, listing, near_matches

PEFT_TYPE = "LORAKIT"
FORMAT = 1
_SHARED = "*"
_SHAPE = ("kind", "out", "in_", "batch", "kernel", "stored")


def to_native(state: AdapterState, reasons: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors."""
    methods: list[Method] = []
    targets = []
    for path, method in state.spec.methods.items():
        if method not in methods:
            methods.append(method)
        shape = state.spec.shapes[path]
        targets.append(
            {"path": path, "method": methods.index(method), **{key: getattr(shape, key) for key in _SHAPE}}
        )
    section = {
        "format": FORMAT,
        "methods": [method.to_json() for method in methods],
        "targets": targets,
        "info": dict(state.spec.info),
        "why_not_peft": list(reasons),
    }
    config = {"peft_type": PEFT_TYPE, "base_model_name_or_path": state.spec.base, "lorakit": section}
    tensors = {f"{path}|{name}": t for path, group in state.tensors.items() for name, t in group.items()}
    return config, tensors | {f"{_SHARED}|{name}": t for name, t in state.shared.items()}


def read_native(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState:
    """The inverse.

    Raises:
        AdapterFileError: The configuration is not as we write it, or the tensors are not those that it describes.
    """
    section = config.get("lorakit")
    if not isinstance(section, Mapping) or section.get("format") != FORMAT:
        found = section.get("format") if isinstance(section, Mapping) else None
        raise AdapterFileError(
            f"The adapter is in lorakit's own form, version {found!r}; this lorakit reads version {FORMAT}. "
            "Update lorakit."
        )
    try:
        methods = [method_from_json(data) for data in section["methods"]]
        of, shapes = {}, {}
        for entry in section["targets"]:
            path = entry["path"]
            of[path] = methods[entry["method"]]
            facts: dict[str, Any] = {k: tuple(v) if isinstance(v := entry[k], list) else v for k in _SHAPE}
            shapes[path] = Shape(**facts)
        info = dict(section["info"])
    except ConfigError as error:
        raise AdapterFileError(f"The adapter uses a method that is not known here: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise AdapterFileError(
            f"The section 'lorakit' of adapter_config.json is not as lorakit writes it: {error!r}."
        ) from error
    expected = {
        f"{path}|{name}": (path, name) for path, method in of.items() for name in method.shapes(shapes[path])
    }
    expected |= {f"{_SHARED}|{name}": (_SHARED, name) for name in shared_shapes(of)}
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        parts = [f"{len(missing)} missing: {listing(missing)}." if missing else ""]
        if unexpected:
            hint = near_matches(unexpected[0], missing or expected, n=1)
            parts.append(f"{len(unexpected)} unexpected: {listing(unexpected)}.{hint}")
        raise AdapterFileError(
            "The tensors are not those that adapter_config.json describes. " + " ".join(filter(None, parts))
        )
    grouped: dict[str, dict[str, Tensor]] = {_SHARED: {}, **{path: {} for path in of}}
    for key, (path, name) in expected.items():
        grouped[path][name] = tensors[key]
    shared = grouped.pop(_SHARED)
    return AdapterState(AdapterSpec(of, shapes, config.get("base_model_name_or_path"), info), grouped, shared)
