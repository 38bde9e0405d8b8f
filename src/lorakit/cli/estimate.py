"""``lorakit estimate``: what a recipe will cost, before anything is downloaded or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.recipe_options import RecipeFile, Settings, recipe_with

if TYPE_CHECKING:
    from lorakit.train.estimating import Estimate


def command(
    context: typer.Context,
    recipe: RecipeFile,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what a recipe will cost: parameters, memory by its terms, the least time. Nothing is downloaded.

    Only the model's config is needed. Where the tokenizer is on this machine, the rows are counted too, and the largest
    batch that the run will meet is the one that is planned for.

    [bold]Examples[/bold]

        lorakit estimate recipes/text_to_sql.yaml
        lorakit estimate recipe.yaml --train.batch_rows 64 --adapter.r 64
        lorakit estimate recipe.yaml --model.name llama-3-8b --model.device cuda --model.quantize nf4
    """
    from lorakit.cli.output import quiet_loading, say_json
    from lorakit.train.estimating import estimate

    quiet_loading()
    found = estimate(recipe_with(context, recipe, settings))
    if as_json:
        say_json(found.plain())
    else:
        _say(found)


def _say(found: Estimate) -> None:
    from lorakit.cli.output import say, say_pairs, say_table, size
    from lorakit.train.estimating import advice, terms
    from lorakit.train.progress import clock

    planned, shape = found.plan, found.shape
    counts = planned.counts
    pairs = [
        ("base", f"{counts.base:,} parameters"),
        ("trained", f"{counts.trainable:,} parameters ({100 * counts.share:.3f} % of all)"),
        ("adapter's file", size(planned.file_bytes(planned.run.adapter_dtype))),
        (
            "largest batch",
            f"{shape.rows:,} rows, {shape.size:,} tokens{', packed' if shape.packed else ''}",
        ),
    ]
    if shape.tokens is not None and shape.steps is not None:
        pairs.append(("run", f"{shape.steps:,} steps, {shape.tokens:,} tokens"))
    for name, own in found.adapters.items():
        pairs.append((f"adapter {name!r}", f"{own.trainable:,} parameters"))
    if found.frozen_cache is not None:
        pairs.append(("train.cache_frozen", f"keeps {size(found.frozen_cache)}"))
    if found.seconds is not None:
        pairs.append(
            (
                "time",
                f"at least {clock(found.seconds)}: the matrix products alone, at this machine's full speed",
            )
        )
    say_pairs(f"{planned.architecture.name} ({planned.run.base_dtype}, {planned.run.device})", pairs)
    if planned.training is not None:
        rows = [
            [name, size(count), f"{100 * count / planned.training.total:.0f} %"]
            for name, count in terms(planned)
        ]
        say_table(
            "",
            ("memory at the peak of a step", "", ""),
            [*rows, ["total", size(planned.training.total), ""]],
        )
        say("To need less:")
        for line in advice(planned):
            say(f"  - {line}")
    for line in found.why:
        say(f"Not known: {line}")
    say("Assumed:")
    for line in planned.assumptions:
        say(f"  - {line}")
