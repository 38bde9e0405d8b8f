"""``lorakit preview``: the rows of a recipe as the model sees them, and what is learnt of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.recipe_options import RecipeFile, Settings, recipe_with

if TYPE_CHECKING:
    from rich.text import Text

    from lorakit.train.preview import Preview, ShownRow
    from lorakit.train.strands import Piece

_COLOURS = {"system": "magenta", "user": "cyan", "tool": "yellow", "assistant": "green", "": "default"}
_BAR = 40


def command(
    context: typer.Context,
    recipe: RecipeFile,
    split: Annotated[
        Literal["train", "valid", "test"], typer.Option("--split", help="Which part of the data.")
    ] = "train",
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many rows to show.")] = 3,
    start: Annotated[int, typer.Option("--start", min=1, help="The first row to show.")] = 1,
    settings: Settings = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page with every token's id.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show rows as the model will read them: who says which token, and which tokens are learnt.

    Learnt tokens stand on a coloured ground, or between ⟦ and ⟧ where there is no colour; the colour tells who speaks.
    All rows of the split are read, so what training would refuse is told here with its file and line.

    [bold]Examples[/bold]

        lorakit preview recipes/text_to_sql.yaml
        lorakit preview recipe.yaml --split valid --rows 10 --html rows.html
        lorakit preview recipe.yaml --train.max_length 256 --train.overlong truncate
    """
    from lorakit.cli.output import quiet_loading, say, say_json
    from lorakit.train.preview import preview
    from lorakit.train.preview_page import write_page

    quiet_loading()
    read = recipe_with(context, recipe, settings)
    found = preview(read, split, rows=rows, start=start)
    if html is not None:
        write_page(found, html, title=str(recipe))
    if as_json:
        say_json(found.plain())
        return
    _show(found)
    if html is not None:
        say(f"The page is {html}.")


def _show(found: Preview) -> None:
    from rich.console import Console
    from rich.text import Text

    from lorakit.cli.output import say, say_pairs

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None and sys.stdout.isatty()
    for row in found.rows:
        say(f"row {row.number}  {row.id}  {row.tokens:,} tokens, {row.learnt:,} learnt")
        for text in _texts(row, coloured):
            console.print(text)
        say()
    if found.roles:
        key = Text("who speaks: ")
        for role in found.roles:
            key.append(f" {role} ", style=_COLOURS.get(role, "default"))
        key.append("  learnt ", style="black on green" if coloured else "")
        if coloured:
            console.print(key)
    share = "" if found.share is None else f" ({100 * found.share:.1f} % of the tokens)"
    pairs = [
        ("rows", f"{found.total:,}"),
        ("tokens", f"{found.tokens:,} ({found.tokens / found.total:.0f} a row)"),
        ("learnt", f"{found.learnt:,} {found.unit}{'s' if found.learnt != 1 else ''}{share}"),
        ("longest", f"{found.longest:,} tokens; train.max_length is {found.max_length:,}"),
        ("too long", _too_long(found)),
    ]
    say_pairs(f"{found.split} split", pairs)
    say("  lengths")
    most = max(bar.rows for bar in found.histogram)
    width = len(f"{found.histogram[-1].high:,}")
    for bar in found.histogram:
        drawn = "█" * round(_BAR * bar.rows / most) or ("▏" if bar.rows else "")
        say(f"  {bar.low:>{width},} to {bar.high:>{width},}  {drawn} {bar.rows:,}")


def _too_long(found: Preview) -> str:
    if found.truncated:
        return f"{found.truncated:,} rows are cut, {found.lost:,} tokens lost (train.overlong: truncate)"
    if found.dropped:
        return f"{found.dropped:,} rows are left out (train.overlong: drop)"
    return "none"


def _texts(row: ShownRow, coloured: bool) -> list[Text]:
    from rich.text import Text

    from lorakit.train.strands import runs_of

    made = []
    for shown in row.strands:
        text = Text()
        if shown.strand.name:
            text.append(f"{shown.strand.name}: ", style="bold")
        for learnt, role, pieces in runs_of(shown.pieces):
            said = "".join(map(_visible, pieces))
            colour = _COLOURS.get(role, "default")
            if coloured:
                text.append(said, style=f"black on {colour if role else 'green'}" if learnt else colour)
            else:
                text.append(f"⟦{said}⟧" if learnt else said)
        if shown.strand.note:
            text.append(f"  → {shown.strand.note}", style="bold")
        made.append(text)
    return made


def _visible(piece: Piece) -> str:
    """A line break shows as ⏎ before it breaks the line; other control characters by their names."""
    return "".join(
        "⏎\n" if char == "\n" else char if char.isprintable() else repr(char)[1:-1] for char in piece.text
    )
