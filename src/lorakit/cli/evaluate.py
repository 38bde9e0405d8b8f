"""``lorakit eval``: score an adapter or the base model on held-out data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe: it names the model, the data and the metrics.")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", "-a", help="Folder of the adapter; by default the one that the recipe trained."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model, without any adapter.")] = False,
    split: Annotated[
        Literal["train", "valid", "test"], typer.Option("--split", help="What to score on.")
    ] = "test",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Only the first examples.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Replace a setting of the recipe."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write every answer to this file, a JSON object a line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score an adapter, or the base model, on the examples of a recipe.

    [bold]Examples[/bold]

        lorakit eval recipes/text_to_sql.yaml
        lorakit eval recipes/text_to_sql.yaml --base --limit 50
        lorakit eval recipes/e2e_nlg.yaml --adapter runs/e2e/adapter --save answers.jsonl --json

    Which metrics: evaluate.metrics in the recipe; by default execution accuracy for SQL, BLEU and NIST where there are
    several references, the loss for conversations; for task: classification accuracy, macro F1 and loss, and a table of
    the labels.
    """
    from lorakit.cli.output import quiet_loading, say, say_json, say_pairs, say_table
    from lorakit.errors import ConfigError
    from lorakit.train import Recipe, evaluate, progress_for

    if base and adapter is not None:
        raise ConfigError("--base scores without an adapter: give --base or --adapter, not both.")
    read = Recipe.from_file(recipe, settings or [])
    if adapter is None and not base:
        adapter = read.output / "adapter"
        if not adapter.is_dir():
            raise ConfigError(
                f"There is no adapter at {adapter}. Train it with `lorakit train {recipe}`, name one with "
                "--adapter, or score the "
                "base model with --base."
            )
    quiet_loading()
    progress = progress_for()
    try:
        result = evaluate(read, adapter=adapter, split=split, limit=limit, progress=progress)
    finally:
        progress.close()
    if save is not None:
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in result.answers)
        save.write_text("".join(lines), encoding="utf-8")
    what = "the base model" if adapter is None else str(adapter)
    if as_json:
        say_json(
            {
                "model": read.model.name,
                "adapter": None if adapter is None else str(adapter),
                "split": split,
                **result.plain(),
            }
        )
        return
    say_pairs(
        f"{read.model.name} with {what}, {result.count} examples of the {split} split, {result.seconds:.0f} s",
        [(name, f"{value:.4f}") for name, value in result.scores.items()],
    )
    if result.labels:
        say_table(
            "",
            ("label", "rows", "given", "right", "precision", "recall", "F1"),
            [
                (
                    s.name,
                    f"{s.count:,}",
                    f"{s.predicted:,}",
                    f"{s.correct:,}",
                    *_shares(s.precision, s.recall, s.f1),
                )
                for s in result.labels
            ],
        )
    if save is not None:
        say(f"The answers are in {save}.")


def _shares(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in values)
