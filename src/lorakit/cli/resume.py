"""``lorakit resume``: go on with a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakit.garbage import seldom_collected


def command(
    folder: Annotated[Path, typer.Argument(help="The run's output folder, which holds run.json.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Replace a setting that may change: train.max_seconds, train.patience, train.save_every, ...",
        ),
    ] = None,
) -> None:
    """Go on with a run from its last checkpoint, as if it had not been stopped: on a CPU, bit for bit.

    The recipe is the one in the folder's run.json, so nothing else need be named. It is refused when the data changed,
    or a setting that would make it another run.

    [bold]Examples[/bold]

        lorakit resume runs/sql
        lorakit resume runs/sql --set train.max_seconds=3600
    """
    from lorakit.cli.train import run, say_result

    with seldom_collected():
        from lorakit.train.run_files import recipe_of_run

    result = run(recipe_of_run(folder, settings or []), resume=True)
    say_result(result, f"lorakit export {folder} --to merged")
