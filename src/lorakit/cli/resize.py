"""``lorakit resize``: an adapter at another rank or size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from lorakit.adapters import Fitted
    from lorakit.core import AdapterState


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", help="The rank of every target; with --energy the most."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Keep this share of each target's squared norm, in (0, 1]."),
    ] = None,
    file_size: Annotated[
        str | None, typer.Option("--size", help="The most bytes of the weights' file, such as 20MB or 512kB.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also bring LoHa, LoKr and LoRA-C to a LoRA.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write an adapter at another rank: at each target the best there is at that rank. Needs no model.

    With --size the directions that hold the most for their bytes are kept over all targets, so that ranks differ. A
    larger rank fills up with zeros. The error is printed: the share of the norm of the change that was left out.

    [bold]Examples[/bold]

        lorakit resize runs/sql/adapter --rank 4 --out sql-r4
        lorakit resize runs/sql/adapter --energy 0.95 --out sql-95
        lorakit resize runs/sql/adapter --size 2MB --dtype bfloat16 --out sql-small
    """
    from lorakit.adapters import resize
    from lorakit.cli.combine import dtype_called, fitted_json, fitted_pairs
    from lorakit.cli.output import check_free, say_json, say_pairs
    from lorakit.errors import ConfigError
    from lorakit.io.adapter_directory import read, write

    check_free(out, overwrite)
    state, kind = read(adapter), dtype_called(dtype)
    if file_size is None:
        made = resize(state, rank, energy=energy, dense=dense, dtype=kind)
    elif rank is not None or energy is not None:
        raise ConfigError("--size decides the ranks itself: leave --rank and --energy out.")
    else:
        made = _within(state, bytes_of(file_size), dense, kind)
    folder = write(made.state, out)
    if as_json:
        say_json(fitted_json(made, folder))
        return
    say_pairs(f"{adapter} resized", fitted_pairs(made, folder))


def _within(state: AdapterState, most: int, dense: bool, dtype: torch.dtype | None) -> Fitted:
    """Resized so that the file, with its header, takes no more."""
    import tempfile

    from lorakit.adapters import resize
    from lorakit.io.adapter_directory import WEIGHTS, write

    made = resize(state, max_bytes=most, dense=dense, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="lorakit-size-") as scratch:
        for _ in range(4):
            over = (write(made.state, scratch) / WEIGHTS).stat().st_size - most
            if over <= 0:
                break
            made = resize(state, max_bytes=made.state.nbytes - over, dense=dense, dtype=dtype)
    return made


def bytes_of(text: str) -> int:
    """``20MB`` as a number: kB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    Raises:
        ConfigError: It is no size.
    """
    from lorakit.errors import ConfigError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)[bB]?\s*", text)
    if found is None:
        raise ConfigError(f"{text!r} is no size: write it as 20MB, 512kB or a number of bytes.")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMG".index(prefix.upper() or " "))
