"""``lorakit inspect``: what is in adapters' files, without their model."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.errors import ConfigError, listing

if TYPE_CHECKING:
    from lorakit.adapters import Analysis, Beside
    from lorakit.adapters.analysis import Group, TargetAnalysis
    from lorakit.adapters.base_weights import BaseWeights
    from lorakit.core import AdapterState


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(help="An adapter's folder or file; several are compared.", metavar="ADAPTER..."),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures, one file that loads nothing.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", help="The base's folder with safetensors: tells what the adapter amplifies in it."
        ),
    ] = None,
    energy: Annotated[
        float,
        typer.Option("--energy", help="Count the rank that holds this share of each change's squared norm."),
    ] = 0.9,
    dense: Annotated[
        bool, typer.Option("--dense", help="Form the changes of LoHa, LoKr and LoRA-C; slow on wide layers.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Which adapter, where the folder holds several.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Of a loralib file, which keeps none.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read a .bin or .pt file, tensors only.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Compare adapters that name different base models.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with every target.")] = False,
) -> None:
    """Tell what is in an adapter: method, rank, targets, sizes, and what its change is like. Needs no model.

    All is of the change (scale times B A), computed from the factors: its norm, its largest singular value (top), and
    how many directions it uses: the effective rank (1 for one direction, r for r equal ones), the stable rank, and the
    rank that holds 90 % of its energy. Of several adapters also what they have in common.

    With --base also the size of the change against the weight, and the amplification factor of the LoRA paper (section
    7.3): how much larger the change is than what the weight does between the same directions.

    [bold]Examples[/bold]

        lorakit inspect runs/sql/adapter
        lorakit inspect runs/sql/adapter --html sql.html --base models/smollm2
        lorakit inspect runs/r8/adapter runs/r64/adapter --html both.html
        lorakit inspect roberta_base_lora_mnli.bin --alpha 16 --allow-pickle --json
    """
    from lorakit.adapters import analyse
    from lorakit.cli.output import say, say_json

    names = _names(paths)
    states = {key: _read(path, name, allow_pickle, alpha) for key, path in names.items()}
    weights = _base_weights(base, states) if base is not None else {}
    found = {
        key: analyse(state, energy=energy, dense=dense, base=weights.get(key))
        for key, state in states.items()
    }
    pairs, apart = _pairs(found, any_base)
    if html is not None:
        _write_page(html, found, pairs)
    if as_json:
        described = [_adapter_json(names[key], analysis) for key, analysis in found.items()]
        if len(described) == 1:
            say_json(described[0])
        else:
            compared = [_pair_json(first, second, beside) for (first, second), beside in pairs.items()]
            say_json({"adapters": described, "pairs": compared})
        return
    for key, analysis in found.items():
        _say_adapter(names[key], analysis)
        if missing := weights[key].missing if key in weights else {}:
            target, reason = next(iter(missing.items()))
            say(f"Not beside the base: {len(missing)} targets, such as {target} ({reason}).\n")
    if pairs:
        _say_pairs(pairs)
    for (first, second), reason in apart.items():
        say(f"{first} and {second} were not compared: {reason}")
    if html is not None:
        say(f"The page is {html}.")


# ---- reading
def _names(paths: list[Path]) -> dict[str, Path]:
    """What to call each adapter: by as much of the end of its path as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    most = max(len(one) for one in parts)
    for count in range(1, most + 1):
        keys = ["/".join(one[-count:]) for one in parts]
        if len(set(keys)) == len(keys):
            return dict(zip(keys, paths, strict=True))
    raise ConfigError(f"An adapter is named twice: {listing(map(str, paths))}.")


def _read(path: Path, name: str | None, allow_pickle: bool, alpha: float | None) -> AdapterState:
    """An adapter's folder, or a file of any format."""
    from lorakit.errors import AdapterFileError
    from lorakit.io.adapter_directory import read

    try:
        return read(path, name=name, allow_pickle=allow_pickle)
    except AdapterFileError:
        if not path.is_file():
            raise
    from lorakit.io.formats import Hints
    from lorakit.io.formats.convert import read_any

    return read_any(path, hints=Hints(alpha=alpha), name=name, allow_pickle=allow_pickle)[0]


def _base_weights(folder: Path, states: dict[str, AdapterState]) -> dict[str, BaseWeights]:
    """The base weights of each adapter, of which there must be some."""
    from lorakit.cli.base_option import no_weight, weights_of_each

    found = dict(zip(states, weights_of_each(folder, list(states.values())), strict=True))
    for weights in found.values():
        if not weights:
            raise no_weight(folder, "the adapter changes", weights)
    return found


def _pairs(
    found: dict[str, Analysis], any_base: bool
) -> tuple[dict[tuple[str, str], Beside], dict[tuple[str, str], str]]:
    """What each two have in common, or why that cannot be told."""
    from lorakit.adapters import beside

    pairs, apart = {}, {}
    for first, second in itertools.combinations(found, 2):
        try:
            pairs[first, second] = beside(found[first].state, found[second].state, any_base=any_base)
        except ConfigError as error:
            apart[first, second] = str(error)
    return pairs, apart


def _write_page(path: Path, found: dict[str, Analysis], pairs: dict[tuple[str, str], Beside]) -> None:
    from lorakit.io.single_file import publish_file
    from lorakit.study.adapter_page import adapter_page

    publish_file(path, [adapter_page(found, pairs).encode("utf-8")])


# ---- as text
def _say_adapter(path: Path, found: Analysis) -> None:
    from lorakit.cli.output import say_pairs, say_table, size

    state = found.state
    pairs = [
        ("base", state.spec.base or "not said"),
        ("targets", f"{len(state.spec.methods):,}"),
        ("parameters", f"{state.numel:,} ({size(state.nbytes)})"),
    ]
    pairs += [(str(key), str(value)) for key, value in state.spec.info.items()]
    if ranks := found.ranks:
        share = ranks.after / ranks.before if ranks.before else 1.0
        kept = f"{ranks.after:,} of the factors' {ranks.before:,} numbers ({share:.0%})"
        pairs.append((f"for {found.energy:.0%} of it", f"{kept}: lorakit resize --energy {found.energy:g}"))
    if bad := found.not_finite:
        pairs.append(("WARNING", f"{len(bad)} tensors hold a NaN or an infinity, such as {bad[0]}"))
    say_pairs(str(path), pairs)
    beside = any(group.amplification is not None for group in found.groups)
    columns = ["target", "method", "size", "sites", "r", "scale", "parameters", "dtype", "norm", "top"]
    columns += ["eff. rank", "stable", f"r at {found.energy:.0%}"]
    columns += ["of weight", "amplified"] if beside else []
    say_table("", columns, [_row(group, beside) for group in found.groups], left=3)


def _row(group: Group, beside: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    low, high = group.energy_ranks or (None, None)
    return [
        group.target,
        group.method,
        group.size,
        str(group.sites),
        number(group.r, "d"),
        number(group.scale, ".4g"),
        f"{group.parameters:,}",
        group.dtype,
        number(group.norm, ".4g"),
        number(group.top, ".4g"),
        number(group.effective_rank, ".2f"),
        number(group.stable_rank, ".2f"),
        number(low, "d") if low == high else f"{low} to {high}",
        *([number(group.relative, ".3g"), number(group.amplification, ".3g")] if beside else []),
    ]


def _say_pairs(pairs: dict[tuple[str, str], Beside]) -> None:
    from lorakit.cli.output import say_table

    rows = []
    for (first, second), found in pairs.items():
        described = _pair_json(first, second, found)
        rows.append([first, second, str(len(found.inputs)), _plain(described["cosine"])])
        for of in ("inputs", "outputs"):
            part = described[of] or {"top": None, "all": None, "random_all": None}
            rows[-1] += [_plain(part["top"]), _plain(part["all"]), _plain(part["random_all"])]
    columns = ["first", "second", "targets", "cosine"]
    columns += [f"{word} {of}" for of in ("in", "out") for word in ("phi(1, 1)", "phi(all)", "random")]
    say_table("In common", columns, rows, left=2)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# ---- as JSON
def _adapter_json(path: Path, found: Analysis) -> dict[str, Any]:
    state, ranks = found.state, found.ranks
    return {
        "path": str(path),
        "base": state.spec.base,
        "info": dict(state.spec.info),
        "parameters": state.numel,
        "bytes": state.nbytes,
        "not_finite": list(found.not_finite),
        "groups": [{**asdict(g), "amplification": _finite(g.amplification)} for g in found.groups],
        "ranks": None
        if ranks is None
        else {
            "energy": ranks.energy,
            "r": ranks.r,
            "rank_pattern": ranks.rank_pattern,
            "before": ranks.before,
            "after": ranks.after,
        },
        "targets": {one: _target_json(target, found.energy) for one, target in found.targets.items()},
    }


def _target_json(target: TargetAnalysis, energy: float) -> dict[str, Any]:
    described: dict[str, Any] = {
        "method": target.method,
        "size": str(target.shape),
        "r": target.r,
        "scale": target.scale,
        "parameters": target.parameters,
    }
    if (s := target.spectrum) is not None:
        described |= {
            "norm": s.frobenius,
            "effective_rank": s.effective_rank,
            "stable_rank": s.stable_rank,
            "energy_rank": s.energy_rank(energy),
            "singular_values": s.values.tolist(),
        }
    if (a := target.amplification) is not None:
        described |= {
            "relative": _finite(a.relative),
            "amplification": {**asdict(a), "factor": _finite(a.factor)},
        }
    return described


def _pair_json(first: str, second: str, found: Beside) -> dict[str, Any]:
    from lorakit.adapters.beside import mean_similarity

    described: dict[str, Any] = {
        "first": first,
        "second": second,
        "targets": len(found.inputs),
        "cosine": found.cosine,
    }
    for of, similarities in (("inputs", found.inputs), ("outputs", found.outputs)):
        mean = mean_similarity(similarities.values())
        described[of] = None
        if mean is not None:
            phi, random = mean
            described[of] = {
                "top": float(phi[0, 0]),
                "all": float(phi[-1, -1]),
                "random_top": float(random[0, 0]),
                "random_all": float(random[-1, -1]),
                "phi": phi.tolist(),
            }
    return described


def _finite(value: float | None) -> float | None:
    """JSON has no word for infinity."""
    return None if value == float("inf") else value
