"""``lorakit demo``: the main job, on a real model, in a few minutes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

_QUICK = {"examples": 64, "questions": 16}


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results; an older demo in it is replaced.")
    ] = Path("runs/demo"),
    model: Annotated[
        str, typer.Option("--model", help="A built-in name, a folder or a hub id of a chat model.")
    ] = "smollm2",
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="Questions to learn from.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option("--questions", min=1, help="Held-out questions to score.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About a minute: shows the way, learns little.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Teach a real model SQL with LoRA, and show what it learnt. No GPU needed.

    SmolLM2-135M-Instruct answers questions about tables that it has never seen, before and after training; its queries
    are run on SQLite. The adapter is merged, unmerged, saved, and loaded again in a new process.

    [bold]Examples[/bold]

        lorakit demo
        lorakit demo --quick
        lorakit demo --examples 2000 --questions 300 --out runs/longer
    """
    from lorakit.cli.output import quiet_loading, say, say_json, say_pairs
    from lorakit.study.demo import EXAMPLES, QUESTIONS, run
    from lorakit.train import progress_for

    usual = _QUICK if quick else {"examples": EXAMPLES, "questions": QUESTIONS}
    quiet_loading()
    progress = progress_for()
    try:
        result = run(
            out,
            model=model,
            examples=examples or usual["examples"],
            questions=questions or usual["questions"],
            seed=seed,
            progress=progress,
        )
    finally:
        progress.close()
    if as_json:
        say_json(asdict(result))
        return
    for question, before, after, gold in result.samples:
        say(f"\n  asked   {question}\n  before  {before}\n  after   {after}\n  gold    {gold}")
    say()
    say_pairs("What an adapter did", result.rows())
    say(
        f"\nThe adapter is in {result.adapter}; the same run again: lorakit train {result.recipe} --overwrite"
    )
    if result.plot is not None:
        say(f"The loss curve is {result.plot}.")
    if not quick and not result.sound:
        say("Something that must hold did not: please report this table.")
        raise typer.Exit(1)
