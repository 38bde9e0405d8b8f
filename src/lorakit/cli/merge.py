"""``lorakit merge``: fold adapters into their base and save a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    model: Annotated[
        str | None, typer.Argument(help="The base, to be loaded: a folder, a built-in name, or a hub id.")
    ] = None,
    adapters: Annotated[list[Path] | None, typer.Argument(help="Folders of one or more adapters.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The base, not to be loaded: a folder, a built-in name, or a GGUF file (Llama family).",
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", "-a", help="With --base: an adapter's folder; repeat it for more."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Weight of each adapter, in their order; 1 by default."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto, float32, bfloat16 or float16. auto keeps the checkpoint's with --base, and is float32 on a CPU "
            "where the model is loaded.",
        ),
    ] = "auto",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="With --base, where the adapter was made on another class than the config names: causal-lm, seq2seq, "
            "sequence-classification, token-classification, image-classification or feature-extraction.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="With --base, merge in float64 too and tell what rounding took; half the time.",
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fold adapters into their base and save a plain transformers model with its tokenizer.

    The merged model needs no lorakit to run. There are two ways, which give the same bits:

    [bold]lorakit merge --base DIR --adapter DIR[/bold] goes through the checkpoint one tensor at a time. The model is
    never loaded: a 70B model merges in the memory of its largest tensor. Names, files and dtypes stay as they are, and
    what rounding to the checkpoint's dtype took is told, beside the same merge in float64.

    [bold]lorakit merge MODEL ADAPTER...[/bold] loads the model, and reads the result back and runs it beside the
    unmerged one before it is kept. It is the way for hub ids, a ResNet's file of weights, and weights that transformers
    makes anew in loading.

    What an adapter was trained for decides what comes out: a classifier has its head and the names of its labels.

    [bold]Examples[/bold]

        lorakit merge --base ./llama-70b --adapter runs/sql/adapter --out llama-70b-sql
        lorakit merge --base ./base -a a -a b -w 0.7 -w 0.3 --out mixed
        lorakit merge --base model.Q4_0.gguf -a runs/sql/adapter --dtype bfloat16 --out ./merged
        lorakit merge smollm2 runs/sql/adapter --out models/smollm2-sql
        lorakit generate models/smollm2-sql -p "..."
    """
    from lorakit.cli.output import quiet_loading
    from lorakit.errors import ConfigError
    from lorakit.train.run_adapter import adapter_folder

    given, listed = list(map(adapter_folder, adapter or [])), list(map(adapter_folder, adapters or []))
    if base is not None and model is not None:
        raise ConfigError(
            "Either --base DIR --adapter DIR ..., one tensor at a time, or MODEL ADAPTER ..., with the model loaded; "
            f"both {base!r} and {model!r} were given."
        )
    quiet_loading()
    if base is not None:
        _stream(base, given, out, weight, dtype, task, measure, overwrite, as_json)
        return
    if model is None or not listed or given or task is not None:
        raise ConfigError(
            "Name a base and an adapter: lorakit merge --base DIR --adapter DIR --out DIR, or, with the model loaded, "
            "lorakit merge MODEL ADAPTER --out DIR (which takes neither --adapter nor --task)."
        )
    _load(model, listed, out, weight, dtype, overwrite, as_json)


def _stream(
    base: str,
    adapters: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None,
    dtype: str,
    task: str | None,
    measure: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from lorakit.cli.output import say_json, say_pairs, size
    from lorakit.models.streaming_merge import merge_checkpoint
    from lorakit.plan.architectures import PlanTask

    made = merge_checkpoint(
        base,
        adapters,
        out,
        weights=weights,
        dtype=dtype,
        task=cast("PlanTask | None", task),
        measure=measure,
        overwrite=overwrite,
    )
    if as_json:
        say_json(
            {
                "folder": str(made.folder),
                "bytes": made.bytes,
                "copied": made.copied,
                "untied": made.untied,
                "relative_error": made.error,
                "tensors": {name: found and asdict(found) for name, found in made.changed.items()},
            }
        )
        return
    pairs = [
        ("saved in", f"{made.folder} ({size(made.bytes)})"),
        ("tensors", f"{len(made.changed):,} merged, {made.copied:,} as they were"),
    ]
    if made.error is not None:
        pairs.append(
            ("rounding took, beside a merge in float64", f"{made.error:.2%} of the norm of the change")
        )
    if made.worst is not None:
        name, share = made.worst
        pairs.append(("most at", f"{name} ({share:.2%})"))
    if made.untied:
        pairs.append(("embedding and head", "were one tensor, and are two now"))
    say_pairs(f"{base} with {', '.join(map(str, adapters))} merged into it", pairs)


def _load(
    model: str,
    adapters: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from lorakit.cli.output import say_json, say_pairs, size
    from lorakit.train.merging import merge_to_folder

    result = merge_to_folder(model, adapters, out, weights=weights, dtype=dtype, overwrite=overwrite)
    if as_json:
        say_json({**asdict(result), "folder": str(result.folder)})
        return
    say_pairs(
        f"{model} with {', '.join(map(str, adapters))} merged into it",
        [
            ("saved in", f"{result.folder} ({size(result.bytes)})"),
            ("largest difference of an output, merged against unmerged", f"{result.merged_difference:.2e}"),
            ("the same, read back from disk", f"{result.saved_difference:.2e}"),
            (
                "what the adapters change in an output",
                f"up to {result.adapter_effect:.2e} (outputs up to {result.largest_logit:.1f})",
            ),
        ],
    )
