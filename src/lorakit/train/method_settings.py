"""The settings of every registered method as keys of a recipe, made from the method's own dataclass.

A method says its settings, their types, defaults and meaning once, in its class; a new one, or a plug-in's, can be
used in a recipe without a change here. A method that wraps another (DoRA) shows the inner one's settings as its own,
and the key ``inner`` names the inner method.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, ClassVar, get_type_hints

from pydantic import Field, create_model

import lorakit.methods  # noqa: F401 - registers the built-in ones
from lorakit.core import Method, method_from_json
from lorakit.core.registry import method_class
from lorakit.train.sections import Section


class MethodSection(Section):
    """A method with its settings; `method_section` makes the subclass that knows those of one method.

    Attributes:
        settings: The keys that are settings of the method.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    method: str = Field(
        default="lora",
        description="The method: `lora`, `dora`, `full`, `bitfit`, or any other that is registered.",
    )

    def build(self) -> Method:
        """The method that this section describes.

        Raises:
            ConfigError: A value makes no sense.
        """
        names = type(self).settings
        return _build(
            self.method, {name: getattr(self, name) for name in names if name in self.model_fields_set}
        )


def method_section(name: str, base: type[MethodSection], inner: str | None = None) -> type[MethodSection]:
    """The subclass of ``base`` that has the settings of a method as keys.

    Args:
        name: The method's registered name.
        base: What else the section holds.
        inner: For a method that wraps another: which one, by default the wrapper's own default.

    Raises:
        ConfigError: No method has that name.
    """
    return _section(method_class(name), base, None if inner is None else method_class(inner))


@cache
def _section(cls: type[Method], base: type[MethodSection], inner: type[Method] | None) -> type[MethodSection]:
    fields = _settings(cls, inner)
    made: type[MethodSection] = create_model(f"{cls.__name__}{base.__name__}", __base__=base, **fields)
    made.settings = tuple(fields)
    return made


def _settings(cls: type[Method], inner: type[Method] | None) -> dict[str, Any]:
    hints, meanings, found = get_type_hints(cls), attribute_docs(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        wrapped = _wrapped(field)
        if wrapped is None:
            found[field.name] = (hints[field.name], _field(field, meanings.get(field.name, "")))
        else:
            kind = inner or wrapped
            found[field.name] = (str, Field(default=kind.name, description=meanings.get(field.name, "")))
            found.update(_settings(kind, None))
    return found


def _wrapped(field: dataclasses.Field[Any]) -> type[Method] | None:
    """The default method of a field that holds one."""
    if field.default_factory is dataclasses.MISSING:
        return None
    value = field.default_factory()
    return type(value) if isinstance(value, Method) else None


def _field(field: dataclasses.Field[Any], meaning: str) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        # A method keeps its mappings in a class of its own, for which pydantic has no words.
        factory = partial(dict, made) if isinstance(made, Mapping) else field.default_factory
        return Field(default_factory=factory, description=meaning)
    if field.default is dataclasses.MISSING:
        return Field(description=meaning)
    return Field(default=field.default, description=meaning)


def _build(name: str, settings: Mapping[str, Any]) -> Method:
    cls = method_class(name)
    own: dict[str, Any] = {"method": name}
    rest = dict(settings)
    inner_key = None
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        wrapped = _wrapped(field)
        if wrapped is not None:
            inner_key = field.name
            rest.setdefault(inner_key, wrapped.name)
        elif field.name in rest:
            own[field.name] = rest.pop(field.name)
    if inner_key is not None:
        inner_name = rest.pop(inner_key)
        own[inner_key] = {"method": inner_name, **rest}
    return method_from_json(own)


def attribute_docs(cls: type) -> dict[str, str]:
    """The ``Attributes:`` sections of a class and of those it inherits from: name to its text on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _own_attribute_docs(base)
    return found


def _own_attribute_docs(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    name = None
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        opening = re.match(r"    (\w+): (.*)", line)
        if opening:
            name = opening[1]
            found[name] = opening[2].strip()
        elif name is not None:
            found[name] += " " + line.strip()
    return found
