"""``lorakit combine``: one adapter from several, without their model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.base_option import HELP as BASE_HELP

if TYPE_CHECKING:
    import torch


def command(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of one or more adapters.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Weight of each adapter, in their order; 1 by default."),
    ] = None,
    how: Annotated[str, typer.Option("--how", help="The way to combine; see below.")] = "sum",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="The most directions of a target in the result.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Keep this share of each target's squared norm, in (0, 1]."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="For ties, dare and prune: the share of entries kept.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws what dare drops.")] = 0,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Form the changes of LoHa, LoKr and LoRA-C; needs --rank or --energy."),
    ] = False,
    copies: Annotated[
        str, typer.Option("--copies", help="Trained copies (heads, token rows): refuse, average or drop.")
    ] = "refuse",
    base: Annotated[
        Path | None, typer.Option("--base", help=f"{BASE_HELP} Needs --rank or --energy.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine adapters that name different base models.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make one adapter of several: the weighted sum of what they change, or another way. Needs no model.

    The sum is exact: factors are stacked and ranks add up. With --rank or --energy the result is the best there is at
    that rank, and its error is printed. Ranks, scales and targets may differ between the adapters. What DoRA and IA3
    change depends on the base's weights: with --base they are read, one at a time.

    [bold]Ways[/bold] (--how)

        sum               the weighted sum; exact, or cut by --rank or --energy
        svd               the weighted sum, cut to the largest rank of the inputs
        ties              trim, elect signs, average what agrees; on the true change
        dare_linear       drop at random, rescale, add; dare_ties elects signs
        magnitude_prune   trim, add
        lorahub           (sum w B)(sum w A), quadratic in the weights
        peft_...          PEFT's forms, number for number: peft_linear, peft_ties, peft_ties_svd, ...

    [bold]Examples[/bold]

        lorakit combine sql python -w 0.7 -w 0.3 --out both
        lorakit combine sql python --energy 0.99 --out smaller
        lorakit combine a b c --how ties --density 0.2 --rank 16 --out merged
        lorakit combine toxic -w -1 --out less-toxic
        lorakit combine dora-a dora-b --base ./base --rank 32 --out both
    """
    from lorakit.adapters import combine
    from lorakit.cli.base_option import base_weights
    from lorakit.cli.output import check_free, say_json, say_pairs
    from lorakit.io.adapter_directory import read, write

    check_free(out, overwrite)
    states = [read(path) for path in adapters]
    made = combine(
        states,
        weight or None,
        how,
        r=rank,
        energy=energy,
        density=density,
        seed=seed,
        dense=dense,
        base=base_weights(base, states),
        copies=copies,
        any_base=any_base,
        dtype=dtype_called(dtype),
    )
    folder = write(made.state, out)
    if as_json:
        say_json(fitted_json(made, folder))
        return
    names = ", ".join(map(str, adapters))
    say_pairs(f"{names} combined ({how})", fitted_pairs(made, folder))


def dtype_called(word: str) -> torch.dtype | None:
    """The dtype of a word; None for ``auto``."""
    import torch

    from lorakit.errors import ConfigError, near_matches

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if word != "auto" and word not in known:
        raise ConfigError(
            f"No dtype is called {word!r}.{near_matches(word, known)} Known: auto, {', '.join(known)}."
        )
    return known.get(word)


def fitted_pairs(made: object, folder: Path) -> list[tuple[str, str]]:
    """What was written, for people."""
    from lorakit.adapters import Fitted
    from lorakit.cli.output import size

    assert isinstance(made, Fitted)
    ranks = sorted({r for method in made.state.spec.methods.values() if (r := rank_of(method)) is not None})
    pairs = [
        ("saved in", str(folder)),
        ("targets", f"{len(made.state.spec.methods):,}"),
        ("ranks", f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"),
        ("parameters", f"{made.state.numel:,} ({size(made.state.nbytes)})"),
    ]
    if made.worst is None:
        return [*pairs, ("left out", "nothing: exact up to one rounding")]
    path, worst = made.worst
    return [
        *pairs,
        ("left out", f"{made.error:.2%} of the norm of the change"),
        ("most at", f"{path} ({worst:.2%})"),
    ]


def fitted_json(made: object, folder: Path) -> dict[str, object]:
    """What was written, for programs."""
    from lorakit.adapters import Fitted

    assert isinstance(made, Fitted)
    return {
        "folder": str(folder),
        "parameters": made.state.numel,
        "bytes": made.state.nbytes,
        "relative_error": made.error,
        "targets": {
            path: {"r": rank_of(method), **_residual(made.residuals.get(path))}
            for path, method in made.state.spec.methods.items()
        },
    }


def rank_of(method: object) -> int | None:
    """The rank of a method, or of what is inside a DoRA."""
    r = getattr(getattr(method, "inner", method), "r", None)
    return r if isinstance(r, int) else None


def _residual(found: object) -> dict[str, float]:
    from lorakit.adapters import Residual

    return {"norm": found.norm, "lost": found.lost} if isinstance(found, Residual) else {}
