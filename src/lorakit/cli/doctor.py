"""``lorakit doctor``: what this machine can do, and which settings to use here."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew instead of taking what the cache knows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what this machine can do: processor, memory, GPU, compiled kernels, installed libraries; and what to set.

    How fast float32 and bfloat16 are multiplied is measured, once, and kept in the cache.

    [bold]Examples[/bold]

        lorakit doctor
        lorakit doctor --again --json
    """
    from lorakit.cli.output import say, say_json, say_pairs
    from lorakit.train.doctor import examine

    found = examine(again=again)
    if as_json:
        say_json(found.plain())
        return
    for title, pairs in found.sections():
        say_pairs(title, pairs)
        say()
    say("Use here:")
    for line in found.advice:
        say(f"  - {line}")
