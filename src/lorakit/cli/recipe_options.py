"""Every key of a recipe as a flag, made from the recipe's own models: ``--train.lr 1e-4``.

A command takes them by being registered with ``cls=RecipeCommand`` and asking `recipe_with` for the recipe. The flags
are made when the command is the one that runs, so that the other commands do not wait for pydantic and torch.
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lorakit.garbage import seldom_collected

if TYPE_CHECKING:
    from lorakit.train.recipe import Recipe
    from lorakit.train.recipe_keys import Key

RecipeFile = Annotated[Path, typer.Argument(help="YAML file that says everything about the run.")]
"""The argument of a command that reads a recipe."""
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Replace a setting of the recipe."),
]
"""The option of a command that reads a recipe."""

_GIVEN = "lorakit.recipe_flags"
_NARROW = 24
_PANELS = {
    "recipe": "Recipe",
    "model": "Recipe: model",
    "adapter": "Recipe: adapter",
    "method": "Recipe: adapter, settings of its method",
    "data": "Recipe: data",
    "train": "Recipe: train",
    "generate": "Recipe: generate",
    "evaluate": "Recipe: evaluate",
}


class RecipeCommand(TyperCommand):
    """A command with a flag for every key of a recipe."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own parameters and the flags."""
        return [*super().get_params(ctx), *_flags()]


def recipe_with(context: typer.Context, recipe: Path, settings: list[str] | None) -> Recipe:
    """The recipe of a file with what was given by ``--set`` and by flags.

    Raises:
        RecipeError: The file cannot be read, or a key or value is wrong.
    """
    from lorakit.train.recipe import Recipe

    return Recipe.from_file(recipe, [*(settings or []), *overrides(context)])


def overrides(context: typer.Context) -> list[str]:
    """What was given as flags, as ``KEY=VALUE`` in their order."""
    return list(context.meta.get(_GIVEN, ()))


@cache
def _flags() -> tuple[Any, ...]:
    with seldom_collected():
        from lorakit.train.recipe_keys import recipe_keys

        keys = recipe_keys()
    parameters = [
        inspect.Parameter(
            f"key{i}",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(
                None,
                f"--{key.name}",
                metavar=_metavar(key.kind),
                help=_help(key),
                rich_help_panel=_PANELS.get(key.section, f"Recipe: {key.section}"),
                callback=_collect(key.name),
                expose_value=False,
                show_default=False,
            ),
            annotation=str | None,
        )
        for i, key in enumerate(keys)
    ]

    def template() -> None: ...

    template.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    template.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(template)
    made = typer.main.get_command(app)
    return tuple(option for option in made.params if option.name != "help")


def _collect(name: str) -> Any:
    def collect(context: typer.Context, value: str | None) -> None:
        if value is not None:
            context.meta.setdefault(_GIVEN, []).append(f"{name}={value}")

    return collect


def _metavar(kind: str) -> str:
    """Long choices stand in the help; a column of a terminal is narrow."""
    return kind if len(kind) <= _NARROW else "CHOICE"


def _help(key: Key) -> str:
    words = key.about
    if len(key.kind) > _NARROW:
        words += f" One of {key.kind.replace('|', ', ')}."
    if key.default:
        words += f" [{key.default}]"
    return words.replace("[", "\\[")
