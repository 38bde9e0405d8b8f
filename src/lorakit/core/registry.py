"""The methods by name, those of plug-ins included (entry-point group ``lorakit.methods``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lorakit.core.method import Method
from lorakit.errors import ConfigError, listing, near_matches

METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known by ``name``, the word that stands in files and recipes."""

    def decorate(cls: M) -> M:
        if name in METHODS and METHODS[name] is not cls:
            raise ConfigError(f"A method called {name!r} is already registered: {METHODS[name]!r}.")
        cls.name = name
        METHODS[name] = cls
        return cls

    return decorate


def method_class(name: str) -> type[Method]:
    """The method called ``name``; plug-ins are loaded only when a name is not known without them.

    Raises:
        ConfigError: No method has that name.
    """
    if name not in METHODS:
        for entry in entry_points(group="lorakit.methods"):
            if entry.name == name:
                register(name)(entry.load())
    if name not in METHODS:
        raise ConfigError(
            f"No method is called {name!r}.{near_matches(name, METHODS)} Known: "
            f"{listing(sorted(METHODS), most=30)}."
        )
    return METHODS[name]


def method_from_json(data: Mapping[str, Any]) -> Method:
    """Rebuild a method from what `Method.to_json` gave.

    Raises:
        ConfigError: The name or a key is unknown.
    """
    values = dict(data)
    if "method" not in values:
        raise ConfigError(
            f"A method is described by a 'method' key and its settings; found keys {sorted(values)}."
        )
    cls = method_class(str(values.pop("method")))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{cls.__name__} has no setting {key!r}.{near_matches(key, fields)} Settings: "
                f"{listing(fields)}."
            )
        if isinstance(value, Mapping) and "method" in value:
            values[key] = method_from_json(value)
        elif isinstance(value, list):
            values[key] = tuple(value)
    return cls(**values)
