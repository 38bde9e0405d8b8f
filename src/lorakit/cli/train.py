"""``lorakit train``: train an adapter as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.recipe_options import RecipeFile, recipe_with
from lorakit.garbage import seldom_collected

if TYPE_CHECKING:
    from lorakit.train import Recipe, TrainResult


def command(
    context: typer.Context,
    recipe: RecipeFile,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Replace a setting of the recipe; the same as --KEY VALUE. As often as needed.",
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
        lorakit train recipe.yaml --train.lr 5e-4 --adapter.r 16 --out runs/r16
        lorakit train recipe.yaml --model.name ./base --adapter.method dora --train.max_steps 100
        lorakit resume runs/r16

    Ctrl-C finishes the step in hand, saves a checkpoint and the adapter, and stops; --resume goes on from there
    as if nothing had happened. The output folder holds the adapter, run.json, metrics.jsonl and loss.png.

    Every key of the recipe is a flag too, listed below; a value is written as in YAML.
    """
    read = recipe_with(context, recipe, settings)
    if out is not None:
        read.output = out
    result = run(read, resume=resume, overwrite=overwrite)
    one = f" --adapter {result.adapter}" if len(result.adapters) == 1 else ""
    say_result(result, f"lorakit eval {recipe}{one}")


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train and show the progress; of several processes the main one does. See `lorakit.train.train`."""
    from lorakit.cli.lean_start import import_trainer
    from lorakit.cli.output import quiet_loading

    with seldom_collected():
        import_trainer()
        from lorakit.train import progress_for, train
        from lorakit.train.distributed import is_main_process

        quiet_loading()
    progress = progress_for() if is_main_process() else None
    try:
        return train(recipe, resume=resume, overwrite=overwrite, progress=progress)
    finally:
        if progress is not None:
            progress.close()


def say_result(result: TrainResult, following: str) -> None:
    """Tell how a run ended, and what to do next.

    Args:
        result: Of `lorakit.train.train`.
        following: The command for a run that is finished.

    Raises:
        typer.Exit: It was stopped by Ctrl-C.
    """
    from lorakit.cli.output import say_pairs
    from lorakit.train.distributed import is_main_process
    from lorakit.train.progress import clock

    if not is_main_process():
        if result.stopped_by == "interrupt":
            raise typer.Exit(130)
        return
    pairs = [
        ("steps", f"{result.steps:,}"),
        ("loss", f"{result.losses[0]:.4f} at the first step, {result.losses[-1]:.4f} at the last"),
    ]
    if result.valid_loss is not None:
        pairs.append(("valid loss", f"{result.valid_loss:.4f}"))
    pairs.append(
        ("time", f"{clock(result.seconds)} ({result.tokens_per_second:,.0f} {result.reads}s a second)")
    )
    for name, report in result.reports.items():
        of = "" if len(result.reports) == 1 else f" of {name}"
        trained = f"{report.trainable:,} parameters beside the base's {report.base_parameters:,}"
        pairs += [(f"trained{of}", trained), (f"adapter{of}", str(result.adapters[name]))]
    if result.best is not None:
        metric, value, step = (result.best[key] for key in ("metric", "value", "step"))
        pairs.append(("best", f"{metric} {value:.4f} at step {step}, in {result.adapter.with_name('best')}"))
    if result.plot is not None:
        pairs.append(("loss curve", str(result.plot)))
    go_on = f"lorakit resume {result.folder}"
    if result.stopped_by == "interrupt":
        pairs.append(("stopped", f"by Ctrl-C; go on with: {go_on}"))
    elif result.stopped_by == "max_seconds":
        pairs.append(("stopped", f"by train.max_seconds; go on with: {go_on} --set train.max_seconds=..."))
    elif result.stopped_by == "patience":
        pairs.append(("stopped", "by train.patience: nothing became better"))
    if result.stopped_by in (None, "patience"):
        pairs.append(("next", following))
    say_pairs("Trained", pairs)
    if result.stopped_by == "interrupt":
        raise typer.Exit(130)
