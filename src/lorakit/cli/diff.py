"""``lorakit diff``: how alike two adapters are, without their model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.base_option import HELP as BASE_HELP

if TYPE_CHECKING:
    from lorakit.adapters import Likeness


def command(
    first: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    second: Annotated[Path, typer.Argument(help="Another's.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Form the changes of LoHa, LoKr and LoRA-C.")
    ] = False,
    base: Annotated[Path | None, typer.Option("--base", help=BASE_HELP)] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Compare adapters that name different base models.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell how alike two adapters are, at each target and as a whole: norms, cosine, distance. Needs no model.

    What is compared is what they change, not their factors: two adapters with other factors, ranks or scales and the
    same change have cosine 1 and distance 0. Cosine: 1 for the same direction, 0 for unrelated ones, -1 for opposites.

    [bold]Examples[/bold]

        lorakit diff runs/a/adapter runs/b/adapter
        lorakit diff sql sql-r4 --json
        lorakit diff dora-a dora-b --base ./base
    """
    from lorakit.adapters import compare
    from lorakit.cli.base_option import base_weights
    from lorakit.cli.output import say, say_json, say_table
    from lorakit.io.adapter_directory import read

    pair = read(first), read(second)
    found = compare(*pair, dense=dense, base=base_weights(base, pair), any_base=any_base)
    if as_json:
        say_json(
            {
                "whole": _json(found.whole),
                "only_first": list(found.only_a),
                "only_second": list(found.only_b),
                "targets": {path: _json(likeness) for path, likeness in found.targets.items()},
            }
        )
        return
    rows = [[path, *_cells(likeness)] for path, likeness in found.targets.items()]
    rows.append(["all together", *_cells(found.whole)])
    say_table("", ("target", "norm of first", "norm of second", "cosine", "distance"), rows)
    for path, only in ((first, found.only_a), (second, found.only_b)):
        if only:
            say(f"{len(only)} targets are in {path} alone.")


def _cells(likeness: Likeness) -> list[str]:
    cosine = likeness.cosine
    return [
        f"{likeness.norm_a:.4g}",
        f"{likeness.norm_b:.4g}",
        "" if cosine is None else f"{cosine:.4f}",
        f"{likeness.distance:.4g}",
    ]


def _json(likeness: Likeness) -> dict[str, float | None]:
    return {
        "norm_first": likeness.norm_a,
        "norm_second": likeness.norm_b,
        "cosine": likeness.cosine,
        "distance": likeness.distance,
    }
