"""Every key of a recipe, found in the pydantic models themselves: for flags, for help, for the JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorakit.core import METHODS
from lorakit.train.data_sections import DataSection
from lorakit.train.method_settings import MethodSection, method_section
from lorakit.train.recipe import AdapterSection, Recipe


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: Dotted, such as ``"train.lr"``.
        section: The first part of the name; ``"recipe"`` for a key at the top level.
        kind: What its value is, in a word for a person, such as ``NUMBER`` or ``linear|cosine``.
        default: Its default, written as in YAML; empty where it has none.
        about: What it means.
    """

    name: str
    section: str
    kind: str
    default: str
    about: str


def recipe_keys() -> list[Key]:
    """All keys, in the order of the sections; those of the methods and of the kinds of data once each."""
    keys: dict[str, Key] = {}
    for name, field in Recipe.model_fields.items():
        for key in _keys(name, field):
            keys.setdefault(key.name, key)
    return list(keys.values())


def _keys(name: str, field: FieldInfo) -> Iterator[Key]:
    if name == "adapter":
        yield from _section_keys("adapter", AdapterSection)
        yield from _method_keys()
    elif name == "data":
        for model in data_models():
            yield from _section_keys("data", model)
    elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        yield from _section_keys(name, field.annotation)
    else:
        yield _key(name, "recipe", field)


def _section_keys(section: str, model: type[BaseModel]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield _key(f"{section}.{name}", section, field)


def _method_keys() -> Iterator[Key]:
    """The settings of all methods; one that several have is told by its first, LoRA going before the others."""
    found: dict[str, tuple[FieldInfo, list[str]]] = {}
    for name in sorted(METHODS, key=lambda name: (name != "lora", name)):
        section = method_section(name, MethodSection)
        for setting in section.settings:
            field, of = found.setdefault(setting, (section.model_fields[setting], []))
            of.append(name)
    for setting, (field, of) in found.items():
        who = ", ".join(of[:4]) + (", ..." if len(of) > 4 else "")
        key = _key(f"adapter.{setting}", "method", field)
        yield Key(key.name, key.section, key.kind, key.default, f"{key.about} ({who})")


def data_models() -> list[type[DataSection]]:
    """The kinds of the section ``data``."""

    def below(model: type[DataSection]) -> Iterator[type[DataSection]]:
        for child in model.__subclasses__():
            if not child.__subclasses__():
                yield child
            yield from below(child)

    return list(dict.fromkeys(below(DataSection)))


def _key(name: str, section: str, field: FieldInfo) -> Key:
    return Key(name, section, _kind(field), _default(field), field.description or "")


def _kind(field: FieldInfo) -> str:
    return _word(_schema_of(field))


def _schema_of(field: FieldInfo) -> dict[str, Any]:
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(field.annotation or str).json_schema()
    except Exception:  # a plug-in's setting may be of a type that JSON schema has no word for
        return {}


def _word(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        words = [_word(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return "|".join(dict.fromkeys(words))
    word = {
        "integer": "INTEGER",
        "number": "NUMBER",
        "boolean": "true|false",
        "array": "[LIST]",
        "object": "{MAPPING}",
    }.get(str(schema.get("type")), "TEXT")
    return "PATH" if schema.get("format") == "path" else word


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    elif field.default is PydanticUndefined:
        return ""
    else:
        value = field.default
    if value is None or value in ([], {}, ()) or isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
