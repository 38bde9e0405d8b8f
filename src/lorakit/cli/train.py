"""``lorakit train``: train an adapter as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[Path, typer.Argument(help="YAML file that says everything about the run.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Replace a setting of the recipe; as often as needed."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder, in place of the recipe's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in an output folder that holds a run.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says.

    A smallest recipe:

        model: smollm2
        data: {builtin: text_to_sql, train: 500}
        output: runs/sql

    [bold]Examples[/bold]

        lorakit train recipes/text_to_sql.yaml
        lorakit train recipe.yaml --set train.lr=5e-4 --set adapter.r=16 --out runs/r16
        lorakit train recipe.yaml --resume

    Ctrl-C finishes the step in hand, saves a checkpoint and the adapter, and stops; --resume goes on from there
    as if nothing had happened. The output folder holds the adapter, run.json, metrics.jsonl and loss.png.
    """
    from lorakit.cli.output import quiet_loading, say_pairs
    from lorakit.train import Recipe, progress_for, train
    from lorakit.train.progress import clock

    read = Recipe.from_file(recipe, settings or [])
    if out is not None:
        read.output = out
    quiet_loading()
    progress = progress_for()
    try:
        result = train(read, resume=resume, overwrite=overwrite, progress=progress)
    finally:
        progress.close()
    pairs = [
        ("steps", f"{result.steps:,}"),
        ("loss", f"{result.losses[0]:.4f} at the first step, {result.losses[-1]:.4f} at the last"),
        ("time", f"{clock(result.seconds)} ({result.tokens_per_second:,.0f} tokens a second)"),
        (
            "trained",
            f"{result.report.trainable:,} parameters beside the base's {result.report.base_parameters:,}",
        ),
        ("adapter", str(result.adapter)),
    ]
    if result.valid_loss is not None:
        pairs.insert(2, ("valid loss", f"{result.valid_loss:.4f}"))
    if result.plot is not None:
        pairs.append(("loss curve", str(result.plot)))
    if result.stopped_by == "interrupt":
        pairs.append(("stopped", f"by Ctrl-C; go on with: lorakit train {recipe} --resume"))
    elif result.stopped_by == "max_seconds":
        pairs.append(("stopped", "by train.max_seconds; raise it and go on with --resume"))
    else:
        pairs.append(("next", f"lorakit eval {recipe} --adapter {result.adapter}"))
    say_pairs("Trained", pairs)
    if result.stopped_by == "interrupt":
        raise typer.Exit(130)
