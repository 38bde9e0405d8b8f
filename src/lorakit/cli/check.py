"""``lorakit check``: whether a recipe would run."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lorakit.cli.recipe_options import RecipeFile, Settings, recipe_with

_MARKS = {"ok": "ok", "warning": "WARNING", "wrong": "WRONG", "skipped": "skipped"}


def command(
    context: typer.Context,
    recipe: RecipeFile,
    settings: Settings = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check a recipe without training: keys, files, columns, template, lengths, labels, targets, one rehearsed step.

    No weights of a hub model are fetched: its model is built on the meta device. The exit code is 0 when training
    would start, and 2 when it would not.

    [bold]Examples[/bold]

        lorakit check recipes/text_to_sql.yaml
        lorakit check recipe.yaml --train.max_length 512 --strict
    """
    from lorakit.cli.output import quiet_loading, say, say_json, say_pairs
    from lorakit.train.checking import check

    quiet_loading()
    report = check(recipe_with(context, recipe, settings))
    passed = report.passed and not (strict and report.count("warning"))
    if as_json:
        say_json({"passed": passed, "findings": [dataclasses.asdict(f) for f in report.findings]})
    else:
        width = max(len(mark) for mark in _MARKS.values())
        title = f"{recipe}: {'training would start' if report.passed else 'training would not start'}"
        say_pairs(title, ((f"{_MARKS[f.state]:{width}}  {f.subject}", f.text) for f in report.findings))
        if report.passed and not passed:
            say("Warnings count as mistakes (--strict).")
    if not passed:
        raise typer.Exit(2)
