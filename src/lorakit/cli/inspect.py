"""``lorakit inspect``: what is in an adapter's files, without its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorakit.core import AdapterState


def command(
    path: Annotated[Path, typer.Argument(help="An adapter's folder, or its .safetensors file.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Which adapter, where the folder holds several.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read a legacy .bin file, tensors only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what is in an adapter: method, rank, targets, sizes, and how large its change is. Needs no model.

    The norm, the largest singular value and the effective rank are of the change (scale times B A), computed from the
    factors. Effective rank: 1 when the change has one direction, r when it has r equal ones (Roy and Vetterli 2007).

    [bold]Examples[/bold]

        lorakit inspect runs/sql/adapter
        lorakit inspect adapter_model.safetensors --json
    """
    from lorakit.cli.output import say_json, say_pairs, say_table, size
    from lorakit.io.adapter_directory import read

    state = read(path, name=name, allow_pickle=allow_pickle)
    groups = summarise(state)
    bad = state.non_finite()
    if as_json:
        say_json(
            {
                "path": str(path),
                "base": state.spec.base,
                "info": dict(state.spec.info),
                "parameters": state.numel,
                "bytes": state.nbytes,
                "not_finite": bad,
                "groups": [asdict(group) for group in groups],
            }
        )
        return
    pairs = [
        ("base", state.spec.base or "not said"),
        ("targets", f"{len(state.spec.methods):,}"),
        ("parameters", f"{state.numel:,} ({size(state.nbytes)})"),
    ]
    pairs += [(str(key), str(value)) for key, value in state.spec.info.items()]
    if bad:
        pairs.append(("WARNING", f"{len(bad)} tensors hold a NaN or an infinity, such as {bad[0]}"))
    say_pairs(str(path), pairs)
    columns = (
        "target",
        "method",
        "size",
        "sites",
        "r",
        "alpha",
        "scale",
        "parameters",
        "bytes",
        "dtype",
        "norm",
        "top",
        "eff. rank",
    )
    say_table("", columns, [_row(group) for group in groups], left=3)


@dataclass(frozen=True)
class Group:
    """Targets of one kind: the same ending, size and method.

    Attributes:
        target: The last part of their paths.
        method: Its name.
        size: Of each weight.
        sites: How many.
        r: The rank, of a low-rank method.
        alpha: Its alpha.
        scale: The factor on B A.
        parameters: Numbers in all of them.
        bytes: Of these.
        dtype: Of these.
        norm: Frobenius norm of the change, root of the sum of squares over the sites.
        top: The largest singular value of any site.
        effective_rank: The mean over the sites.
    """

    target: str
    method: str
    size: str
    sites: int
    r: int | None
    alpha: float | None
    scale: float | None
    parameters: int
    bytes: int
    dtype: str
    norm: float | None
    top: float | None
    effective_rank: float | None


def summarise(state: AdapterState) -> list[Group]:
    """The targets of an adapter in groups, in the order of the file."""
    from lorakit.adapters import spectrum

    keys: dict[tuple[object, ...], list[str]] = {}
    for path, method in state.spec.methods.items():
        inner = getattr(method, "inner", method)
        settings = tuple(getattr(inner, key, None) for key in ("r", "alpha", "scale"))
        dtypes = "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.tensors[path].values()}))
        key = (path.rsplit(".", 1)[-1], method.name, str(state.spec.shapes[path]), *settings, dtypes)
        keys.setdefault(key, []).append(path)
    groups = []
    for (target, method_name, shape, r, alpha, scale, kinds), paths in keys.items():
        tensors = [t for path in paths for t in state.tensors[path].values()]
        found = [s for path in paths if (s := spectrum(state, path)) is not None]
        found = found if len(found) == len(paths) else []  # a sum over some of the sites would mislead
        groups.append(
            Group(
                str(target),
                str(method_name),
                str(shape),
                len(paths),
                r,  # type: ignore[arg-type]
                alpha,  # type: ignore[arg-type]
                scale,  # type: ignore[arg-type]
                sum(t.numel() for t in tensors),
                sum(t.numel() * t.element_size() for t in tensors),
                str(kinds),
                sum(s.frobenius**2 for s in found) ** 0.5 if found else None,
                max(s.top for s in found) if found else None,
                sum(s.effective_rank for s in found) / len(found) if found else None,
            )
        )
    return groups


def _row(group: Group) -> list[str]:
    from lorakit.cli.output import size

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        group.target,
        group.method,
        group.size,
        str(group.sites),
        number(group.r, "d"),
        number(group.alpha, "g"),
        number(group.scale, ".4g"),
        f"{group.parameters:,}",
        size(group.bytes),
        group.dtype,
        number(group.norm, ".4g"),
        number(group.top, ".4g"),
        number(group.effective_rank, ".2f"),
    ]
