"""``lorakit export``: what was trained, in the form that another program takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorakit.train.exporting import Exported


def command(
    folder: Annotated[Path, typer.Argument(help="A run's output folder, or an adapter's.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="merged: a plain transformers model. peft, native, gguf (for llama.cpp), kohya, ...: the adapter "
            "alone, see lorakit convert.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to; by default beside the adapter, named after the format."),
    ] = None,
    which: Annotated[
        str, typer.Option("--which", help="Of a run: last or best (where the run kept a best one).")
    ] = "last",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="The base, where the run or the adapter does not name it or it is elsewhere."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of a merged model: auto, float32, bfloat16 or float16.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export what a run has trained: merged into its base, or the adapter alone in another program's format.

    What is needed besides (the base model, its config for GGUF) is taken from the run's own record.

    [bold]Examples[/bold]

        lorakit export runs/sql --to merged
        lorakit export runs/sql --to gguf --out sql.gguf
        lorakit export runs/sql --to peft --which best --out sql-adapter
        lorakit export ./adapter --to merged --model ./base --dtype bfloat16
    """
    from lorakit.cli.output import quiet_loading, say_json, say_pairs
    from lorakit.train.exporting import export

    quiet_loading()
    result = export(folder, to, out=out, which=which, model=model, dtype=dtype, overwrite=overwrite)
    if as_json:
        say_json(result.plain())
        return
    say_pairs(f"{folder} exported", _pairs(result))


def _pairs(result: Exported) -> list[tuple[str, str]]:
    from lorakit.cli.output import size

    pairs = [
        ("adapter", str(result.adapter)),
        ("format", result.format),
        ("written to", f"{result.path} ({size(result.bytes)})"),
    ]
    if result.base is not None:
        pairs.insert(1, ("base", result.base))
    if result.difference is not None:
        pairs.append(("largest difference of an output, read back from disk", f"{result.difference:.2e}"))
    if result.rounding is not None:
        pairs.append(
            ("rounding took, beside a merge in float64", f"{result.rounding:.2%} of the norm of the change")
        )
    pairs += [("not in the new file", loss) for loss in result.losses]
    return pairs
