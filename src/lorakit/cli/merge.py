"""``lorakit merge``: fold adapters into their base and save a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The base: a folder, a built-in name, or a hub id.")],
    adapters: Annotated[list[Path], typer.Argument(help="Folders of one or more adapters.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Weight of each adapter, in their order; 1 by default."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fold adapters into their base and save a plain transformers model with its tokenizer.

    The merged model needs no lorakit to run. It is read back and run beside the unmerged one before it is kept.

    [bold]Examples[/bold]

        lorakit merge smollm2 runs/sql/adapter --out models/smollm2-sql
        lorakit merge ./base a b --weight 0.7 --weight 0.3 --out ./mixed
        lorakit generate models/smollm2-sql -p "..."
    """
    from dataclasses import asdict

    from lorakit.cli.output import quiet_loading, say_json, say_pairs, size
    from lorakit.train.merging import merge_to_folder

    quiet_loading()
    result = merge_to_folder(model, adapters, out, weights=weight, dtype=dtype, overwrite=overwrite)
    if as_json:
        say_json({**asdict(result), "folder": str(result.folder)})
        return
    say_pairs(
        f"{model} with {', '.join(map(str, adapters))} merged into it",
        [
            ("saved in", f"{result.folder} ({size(result.bytes)})"),
            ("largest difference of a logit, merged against unmerged", f"{result.merged_difference:.2e}"),
            ("the same, read back from disk", f"{result.saved_difference:.2e}"),
            (
                "what the adapters change in a logit",
                f"up to {result.adapter_effect:.2e} (logits up to {result.largest_logit:.1f})",
            ),
        ],
    )
