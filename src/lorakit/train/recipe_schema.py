"""The JSON schema of recipes: for editors, which then complete keys and mark mistakes while a recipe is written."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from lorakit.core import METHODS
from lorakit.train.method_settings import MethodSection, method_section
from lorakit.train.recipe import AdapterSection, LearnerSection, Recipe
from lorakit.train.recipe_keys import data_models

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEFS = "#/$defs/{model}"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file, with the settings of every registered method and every kind of data.

    It says what can be said of each value alone; rules about several keys together are checked by `Recipe` only.
    """
    schema = Recipe.model_json_schema(ref_template=_DEFS)
    definitions = schema.setdefault("$defs", {})
    properties = schema["properties"]
    groups = _methods(MethodSection, definitions)
    adapters = _methods(AdapterSection, definitions)
    learners = _methods(LearnerSection, definitions)
    for name in (*adapters, *learners):
        fields = definitions[name]["properties"]
        fields["groups"] = _or_null(
            {"type": "object", "additionalProperties": {"anyOf": [_reference(group) for group in groups]}},
            fields["groups"].get("description"),
        )
    data = {"anyOf": [_reference(model.__name__) for model in data_models()]}
    for name in learners:
        fields = definitions[name]["properties"]
        fields["data"] = {**_described(fields["data"]), **data}
    properties["adapter"] = {
        **_described(properties["adapter"]),
        "anyOf": [_reference(name) for name in adapters],
    }
    properties["adapters"] = _or_null(
        {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_reference(name) for name in learners]},
        },
        properties["adapters"].get("description"),
    )
    # With several adapters each one's data stand in it.
    schema["required"] = [key for key in schema["required"] if key != "data"]
    schema["anyOf"] = [{"required": ["data"]}, {"required": ["adapters"]}]
    _, described = models_json_schema([(model, "validation") for model in data_models()], ref_template=_DEFS)
    definitions.update(described.get("$defs", {}))
    properties["data"] = {**_described(properties["data"]), **data}
    properties["model"] = {
        **_described(properties["model"]),
        "anyOf": [{"type": "string"}, _reference("ModelSection")],
    }
    _let_variables_stand(schema)
    return {"$schema": DIALECT, **schema, "title": "lorakit recipe"}


def _methods(base: type[MethodSection], definitions: dict[str, Any]) -> list[str]:
    """Define a section for each method (and for each that a wrapping method may wrap); returns their names."""
    names = []
    for method in sorted(METHODS):
        plain = method_section(method, base)
        inners = [None] if "inner" not in plain.settings else [None, *_wrappable(method, base)]
        for inner in inners:
            section = plain if inner is None else method_section(method, base, inner)
            made = section.model_json_schema(ref_template=_DEFS)
            definitions.update(made.pop("$defs", {}))
            name = f"{base.__name__}_{method}" + ("" if inner is None else f"_{inner}")
            made["properties"]["method"] = {**made["properties"]["method"], "const": method}
            required = set(made.get("required", ()))
            if method != "lora":
                required.add("method")
            if inner is not None:
                made["properties"]["inner"] = {**made["properties"]["inner"], "const": inner}
                required.add("inner")
            if required:
                made["required"] = sorted(required)
            definitions[name] = made
            names.append(name)
    return names


def _wrappable(wrapper: str, base: type[MethodSection]) -> list[str]:
    """The methods that a wrapping method takes as ``inner``."""
    found = []
    for name in sorted(METHODS):
        if name == wrapper or "inner" in method_section(name, base).settings:
            continue
        section = method_section(wrapper, base, name)
        missing = {key: 1 for key, field in section.model_fields.items() if field.is_required()}
        try:
            section.model_validate({"method": wrapper, "inner": name, **missing}).build()
        except ValueError:
            continue
        found.append(name)
    return found


def _or_null(schema: dict[str, Any], about: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"anyOf": [schema, {"type": "null"}], "default": None}
    return made if about is None else {**made, "description": about}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _DEFS.format(model=name)}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": schema["description"]} if "description" in schema else {}


def _let_variables_stand(node: Any) -> None:
    """Where a number or a word of a choice is expected, ``${NAME}`` may stand too."""
    if isinstance(node, dict):
        for value in node.values():
            _let_variables_stand(value)
        kind = node.get("type")
        if kind in ("integer", "number", "boolean") or ("enum" in node and kind == "string"):
            inside = {
                key: node.pop(key) for key in list(node) if key not in ("description", "default", "title")
            }
            node["anyOf"] = [inside, {"type": "string", "pattern": r"\$\{\w+(:-[^}]*)?\}"}]
    elif isinstance(node, list):
        for value in node:
            _let_variables_stand(value)
