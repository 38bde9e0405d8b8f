"""``lorakit schema``: the JSON schema of recipes, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write it to a file, in place of standard output.")
    ] = None,
) -> None:
    """Print the JSON schema of a recipe: editors with it complete keys and mark mistakes while one types.

    It knows the settings of every method. Name it in the first line of a recipe:

        # yaml-language-server: $schema=./recipe.schema.json

    [bold]Examples[/bold]

        lorakit schema --out recipe.schema.json
        lorakit schema | less
    """
    import json

    from lorakit.cli.output import say
    from lorakit.train.recipe_schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if out is None:
        say(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    say(f"The schema is in {out}.")
