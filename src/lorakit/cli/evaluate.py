"""``lorakit eval``: score an adapter or the base model on held-out data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.recipe_options import Settings, recipe_with

if TYPE_CHECKING:
    from lorakit.train import EvalResult, Recipe


def command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe: it names the model, the data and the metrics.")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Folder of the adapter, or of its run; by default the one that the recipe trained.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model, without any adapter.")] = False,
    split: Annotated[
        Literal["train", "valid", "test"], typer.Option("--split", help="What to score on.")
    ] = "test",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Only the first examples.")
    ] = None,
    settings: Settings = None,
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
        lorakit eval recipes/trec.yaml --base --model.name runs/trec-lora/adapter-merged

    Which metrics: evaluate.metrics in the recipe; by default execution accuracy for SQL, BLEU and NIST where there are
    several references, the loss for conversations; for task: classification accuracy, macro F1 and loss, and a table of
    the labels; for every other task what its page in the documentation says. Of a recipe with several adapters each is
    scored on its own data.
    """
    from lorakit.cli.output import quiet_loading, say, say_json
    from lorakit.errors import ConfigError
    from lorakit.train import evaluate, progress_for
    from lorakit.train.run_adapter import adapter_folder

    if base and adapter is not None:
        raise ConfigError("--base scores without an adapter: give --base or --adapter, not both.")
    read = recipe_with(context, recipe, settings)
    if adapter is not None:
        adapter = adapter_folder(adapter)
    scored = _to_score(read, adapter, base, recipe)
    quiet_loading()
    progress = progress_for()
    try:
        results = [
            (where, evaluate(part, adapter=where, split=split, limit=limit, progress=progress))
            for part, where in scored
        ]
    finally:
        progress.close()
    if save is not None:
        lines = (
            json.dumps(asdict(answer), ensure_ascii=False) + "\n"
            for _, result in results
            for answer in result.answers
        )
        save.write_text("".join(lines), encoding="utf-8")
    if as_json:
        told = [
            {
                "model": read.model.name,
                "adapter": None if where is None else str(where),
                "split": split,
                **result.plain(),
            }
            for where, result in results
        ]
        say_json(told[0] if len(told) == 1 else told)
        return
    for where, result in results:
        what = "the base model" if where is None else str(where)
        _tell(f"{read.model.name} with {what}", split, result)
    if save is not None:
        say(f"The answers are in {save}.")


def _to_score(
    read: Recipe, adapter: Path | None, base: bool, recipe: Path
) -> list[tuple[Recipe, Path | None]]:
    """What is scored: each part of a recipe with the folder of its adapter, or None for the base."""
    from lorakit.errors import ConfigError

    parts = read.parts()
    if base:
        return [(part, None) for part in parts]
    own = {(part.output / "adapter").resolve(): part for part in parts}
    if adapter is not None:
        if len(parts) > 1 and adapter.resolve() not in own:
            raise ConfigError(
                f"The recipe has {len(parts)} adapters, each with its own data, and {adapter} is no folder of theirs: "
                f"{', '.join(str(part.output / 'adapter') for part in parts)}."
            )
        return [(own.get(adapter.resolve(), parts[0]), adapter)]
    for part in parts:
        if not (part.output / "adapter").is_dir():
            raise ConfigError(
                f"There is no adapter at {part.output / 'adapter'}. Train it with `lorakit train {recipe}`, name one "
                "with --adapter, or score the base model with --base."
            )
    return [(part, part.output / "adapter") for part in parts]


def _tell(title: str, split: str, result: EvalResult) -> None:
    from lorakit.cli.output import say_pairs, say_table

    say_pairs(
        f"{title}, {result.count} examples of the {split} split, {result.seconds:.0f} s",
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


def _shares(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in values)
