"""Reading a recipe from YAML, and saying what is wrong with it: the key, the line, and what was meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorakit.errors import RecipeError, listing, near_matches
from lorakit.train.recipe import Recipe

_SHORTHANDS = {"model": "name"}  # sections that may be written as one string, and the key it stands for
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")

Lines = Mapping[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-5`` as a number (YAML 1.2), which PyYAML takes for a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """See `Recipe.from_file`."""
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name the recipe, a YAML file.{_of_run(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}.{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    values, lines = parse(text, str(path))
    for override in overrides:
        values = with_override(values, override)
    return check_recipe(values, lines, path.resolve().parent, str(path))


def _of_run(folder: Path) -> str:
    """A hint for who names the folder of a run."""
    if not (folder / "run.json").exists():
        return ""
    return f" It holds a run: name the recipe that it was trained with, and --adapter {folder / 'adapter'}."


def parse(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping that a YAML text holds, and the line of every key.

    Raises:
        RecipeError: It is not YAML, is no mapping, or has a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{source} must hold a mapping of sections (model, data, train, output, ...).")
        lines = dict(_lines(node, (), source))
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise RecipeError(
            f"{source}{where}: this is not valid YAML: {getattr(error, 'problem', error)}."
        ) from error
    finally:
        loader.dispose()


def _lines(
    node: yaml.MappingNode, path: tuple[str, ...], source: str
) -> Iterator[tuple[tuple[str, ...], int]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise RecipeError(
                f"{source}, line {line}: {'.'.join((*path, key.value))!r} stands here a second time (first "
                f"in line {seen[key.value]})."
            )
        seen[key.value] = line
        yield (*path, key.value), line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, (*path, key.value), source)


def with_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """The values with one replaced, as ``"train.lr=1e-4"``; the value is read as YAML.

    Raises:
        RecipeError: It is not of that form.
    """
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"A setting is written KEY=VALUE, such as train.lr=1e-4; got {override!r}.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value of {override!r} is not valid YAML: {error}.") from error
    return _replaced(values, keys, value, override)


def _replaced(values: Mapping[str, Any], keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    key, *rest = keys
    if not rest:
        return {**values, key: value}
    inside = values.get(key, {})
    if isinstance(inside, str) and key in _SHORTHANDS:
        inside = {_SHORTHANDS[key]: inside}
    if inside is None:
        inside = {}
    if not isinstance(inside, Mapping):
        raise RecipeError(f"{override!r} cannot be set: {key!r} holds {inside!r}, which has no keys.")
    return {**values, key: _replaced(inside, rest, value, override)}


def check_recipe(values: Mapping[str, Any], lines: Lines, folder: Path | None, source: str) -> Recipe:
    """Validate plain data, and turn what pydantic finds into one message for people.

    Raises:
        RecipeError: Something is wrong; all of it is listed.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{source} must hold a mapping of sections.")
    expanded = _expand(values, (), lines, source)
    try:
        return Recipe.model_validate(expanded, context={"folder": folder})
    except ValidationError as error:
        found = list(_messages(error, (), lines, source))
        head = f"{source} has {len(found)} mistakes:\n  " if len(found) > 1 else ""
        raise RecipeError(head + "\n  ".join(found)) from error


def _messages(error: ValidationError, path: tuple[str, ...], lines: Lines, source: str) -> Iterator[str]:
    for item in error.errors():
        where = (*path, *(str(part) for part in item["loc"]))
        context = item.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, ValidationError):
            yield from _messages(cause, where, lines, source)
            continue
        yield f"{_at(where, lines, source)}{_words(item, cause)}"


def _at(where: tuple[str, ...], lines: Lines, source: str) -> str:
    """File, line and dotted path of a key; for a missing key the line of its section."""
    line = next((lines[where[:end]] for end in range(len(where), 0, -1) if where[:end] in lines), None)
    key = f"{'.'.join(where)!r} " if where else ""
    return f"{source}{'' if line is None else f', line {line}'}: {key}"


def _words(item: Any, cause: Exception | None) -> str:
    if item["type"] == "missing":
        return "is missing."
    if item["type"] == "unknown_key":
        return str(item["msg"])
    message = str(cause) if cause is not None else item["msg"]
    if cause is not None:
        return f"makes no sense: {message}"
    given = repr(item["input"])
    return f"is wrong: {message[0].lower()}{message[1:]}; got {given if len(given) <= 80 else given[:77] + '...'}."


def _expand(value: Any, path: tuple[str, ...], lines: Lines, source: str) -> Any:
    """Environment variables in all strings."""
    if isinstance(value, Mapping):
        return {key: _expand(item, (*path, str(key)), lines, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path, lines, source) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise RecipeError(
                f"{_at(path, lines, source)}needs the environment variable {name}, which is not set. "
                f"Set it, or give a default in the recipe: ${{{name}:-default}}."
            )
        return found

    return _VARIABLE.sub(variable, value)


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    recipes = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    return near_matches(path.name, recipes) or (
        f" Beside it would be: {listing(recipes)}." if recipes else ""
    )
