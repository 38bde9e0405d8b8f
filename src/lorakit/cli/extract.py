"""``lorakit extract``: a LoRA from a base model and a fine-tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[Path, typer.Argument(help="The base: a folder with safetensors, or one file.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model, likewise.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter.")],
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="The most directions of a target.")] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Keep this share of each difference's squared norm, in (0, 1]."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Ending of a layer's path; by default all linear layers that differ."
        ),
    ] = None,
    rest: Annotated[
        str, typer.Option("--rest", help="Other parameters that differ: report them, or save them as copies.")
    ] = "report",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Subspace iteration: far faster on wide layers, nearly the best; needs --rank."
        ),
    ] = False,
    transposed: Annotated[
        str | None,
        typer.Option(
            "--transposed", help="Regular expression for layers stored as (in, out); GPT-2's are known."
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option("--base-name", help="What the adapter's file calls its base; by default BASE."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a LoRA of what fine-tuning changed: the best approximation of each layer's difference. Loads no model.

    One tensor is in memory at a time. What the LoRA cannot hold is told: the share of the norm that was left out at
    each target, and the parameters that differ beside them (norms, biases, embeddings).

    [bold]Examples[/bold]

        lorakit extract ./base ./tuned --rank 32 --out tuned-lora
        lorakit extract ./base ./tuned --energy 0.9 -t q_proj -t v_proj --out attention-only
        lorakit extract ./base ./tuned --rank 64 --fast --rest save --out everything
    """
    from lorakit.adapters.checkpoints import conv1d_of, from_checkpoints
    from lorakit.cli.combine import dtype_called, fitted_json, fitted_pairs
    from lorakit.cli.output import check_free, say_json, say_pairs
    from lorakit.io.adapter_directory import write
    from lorakit.io.checkpoint import Checkpoint

    check_free(out, overwrite)
    old, new = Checkpoint(base), Checkpoint(tuned)
    found = from_checkpoints(
        old,
        new,
        r=rank,
        energy=energy,
        targets=target,
        transposed=transposed or conv1d_of(old.config, new.config),
        rest=rest,
        exact=not fast,
        base_name=base_name or str(base),
        dtype=dtype_called(dtype),
    )
    folder = write(found.state, out)
    if as_json:
        say_json({**fitted_json(found.fitted, folder), "not_held": dict(found.left_out), "equal": found.same})
        return
    pairs = [*fitted_pairs(found.fitted, folder), ("equal tensors", f"{found.same:,}")]
    worst = sorted(found.left_out.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} ({norm:.3g})" for name, norm in worst[:5])
    if worst:
        pairs.append(
            ("NOT HELD", f"{len(worst)} more tensors differ (norm), such as {shown}: --rest save keeps them")
        )
    say_pairs(f"{tuned} minus {base}", pairs)
