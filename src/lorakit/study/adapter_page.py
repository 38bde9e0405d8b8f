"""A page about adapters: one HTML file with its pictures inside, nothing loaded from anywhere, for screen and paper."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files

from torch import Tensor

import lorakit
from lorakit.adapters.amplification import Amplification
from lorakit.adapters.analysis import Analysis, TargetAnalysis
from lorakit.adapters.beside import Beside, mean_similarity
from lorakit.study.drawings import Cells, curves, heat_map, number, square, table

_MOST_PAIRS = 6
_MOST_CELLS = 32  # rows and columns of a picture of phi


def adapter_page(
    adapters: Mapping[str, Analysis], pairs: Mapping[tuple[str, str], Beside] | None = None
) -> str:
    """The page as HTML.

    Args:
        adapters: What each adapter is called, and its analysis.
        pairs: Two of the names to what these adapters have in common; shown for the first six.
    """
    names = list(adapters)
    title = names[0] if len(names) == 1 else f"{len(names)} adapters"
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(names) == 1:
        parts.append(_adapter(adapters[names[0]]))
    else:
        parts.append(_overview(adapters))
        parts += [_pair(first, second, found) for (first, second), found in _first(pairs or {})]
        parts += [
            f'<section class="adapter"><h2>{escape(name)}</h2>{_adapter(found)}</section>'
            for name, found in adapters.items()
        ]
    css = files("lorakit.study").joinpath("adapter_page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} - lorakit inspect</title>\n<style>\n{css}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<footer>Made by lorakit {lorakit.__version__} from the files of the adapter alone"
        + (" and its base weights" if any(_beside_base(found) for found in adapters.values()) else "")
        + ".</footer>\n</body></html>\n"
    )


# ---- one adapter
def _adapter(found: Analysis) -> str:
    spec = found.state.spec
    counts = Counter(method.name for method in spec.methods.values())
    methods = ", ".join(f"{name} at {count} targets" for name, count in counts.most_common())
    base = f"for {spec.base}" if spec.base else "the files name no base"
    parts = [f'<p class="about">{escape(methods)}; {escape(base)}</p>']
    if bad := found.not_finite:
        parts.append(
            f'<p class="warning">{len(bad)} tensors hold a NaN or an infinity, such as {escape(bad[0])}.</p>'
        )
    parts.append(_tiles(found))
    if found.with_spectrum:
        parts += [_where(found), _directions(found), _ranks(found), _base(found)]
    else:
        parts.append(
            "<p>No target has factors, so there is no spectrum to show (--dense forms the changes).</p>"
        )
    parts.append(_tables(found))
    return "\n".join(part for part in parts if part)


def _tiles(found: Analysis) -> str:
    state = found.state
    tiles = [
        ("targets", f"{len(found.targets):,}", ""),
        ("parameters", f"{state.numel:,}", ""),
        ("size", f"{state.nbytes / 1e6:,.1f}", "MB"),
    ]
    if (ranks := found.ranks) is not None:
        used = sorted({s.values.shape[-1] for s in found.with_spectrum.values()})
        of = f"of {used[0]}" if len(used) == 1 else f"of {used[0]} to {used[-1]}"
        tiles += [
            ("norm of the change", number(found.norm), ""),
            ("effective rank, mean", number(found.effective_rank, 2), of),
            (
                f"rank for {found.energy:.0%} energy, median",
                f"{statistics.median(ranks.targets.values()):g}",
                of,
            ),
        ]
    if beside := _beside_base(found):
        tiles.append(("amplification, median", number(statistics.median(a.factor for a in beside)), "x"))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(unit)}</small></dd></div>"
        for name, value, unit in tiles
    )
    return f'<dl class="tiles">{shown}</dl>'


def _where(found: Analysis) -> str:
    return (
        "<h2>Where the change is</h2>"
        "<p>The Frobenius norm of what the adapter adds to each weight, by kind and layer.</p>"
        + _map(found, found.norms(), "norm of the change")
    )


def _directions(found: Analysis) -> str:
    cells = _cells(found, lambda t: t.spectrum.effective_rank if t.spectrum else None, statistics.mean)
    by_kind: dict[str, dict[str, list[float]]] = {}
    for t in found.targets.values():
        if t.spectrum is not None:
            by_kind.setdefault(t.place.kind, {})[t.path] = t.spectrum.energy.tolist()
    order = {layer: n for n, layer in enumerate(found.layers)}
    charts = []
    for kind, lines in by_kind.items():
        ordered = dict(sorted(lines.items(), key=lambda line: order[found.targets[line[0]].place.layer]))
        note = f"{len(lines)} weights" if len(lines) > 1 else ""
        charts.append(curves(ordered, title=kind, note=note, across="directions", aim=found.energy))
    return (
        "<h2>How many directions it uses</h2>"
        "<p>The effective rank: 1 when all of a change goes in one direction, r when it uses r directions equally.</p>"
        + _map(found, cells, "effective rank")
        + "<h3>Energy</h3>"
        f"<p>The share of the squared norm that the first directions hold; a line for each weight, later layers "
        f"stronger. The dashed line is at {found.energy:.0%}.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _ranks(found: Analysis) -> str:
    ranks = found.ranks
    assert ranks is not None
    cells = _cells(found, lambda t: float(ranks.targets[t.path]) if t.spectrum else None, max)
    pattern = "".join(f"\n    {json.dumps(key)}: {r}" for key, r in ranks.rank_pattern.items())
    recipe = f"adapter:\n  method: lora\n  r: {ranks.r}" + (f"\n  rank_pattern:{pattern}" if pattern else "")
    share = ranks.after / ranks.before if ranks.before else 1.0
    return (
        f"<h2>Ranks that hold {found.energy:.0%} of it</h2>"
        f"<p>The least rank at which each weight keeps {found.energy:.0%} of its energy. With these the factors would "
        f"have {ranks.after:,} numbers, {share:.0%} of {ranks.before:,}.</p>"
        + _map(found, cells, "rank")
        + f"<details><summary>As settings for the next training</summary><pre>{escape(recipe)}</pre></details>"
    )


def _base(found: Analysis) -> str:
    if not _beside_base(found):
        return ""
    relative = _cells(found, lambda t: t.amplification.relative if t.amplification else None, statistics.mean)
    factors = _cells(found, lambda t: t.amplification.factor if t.amplification else None, statistics.median)
    return (
        "<h2>Beside the base weights</h2>"
        "<p>How large the change is against the weight that it is added to.</p>"
        + _map(found, relative, "‖ΔW‖ / ‖W‖")
        + "<h3>Amplification</h3>"
        "<p>How much larger the change is than what the base weight does between the same directions. "
        "Large: the adapter strengthens what is there but weak.</p>"
        + _map(found, factors, "amplification factor")
    )


def _tables(found: Analysis) -> str:
    beside = bool(_beside_base(found))
    share = f"r at {found.energy:.0%}"
    columns = [
        "weights",
        "method",
        "size",
        "count",
        "r",
        "scale",
        "parameters",
        "norm",
        "largest σ",
        "eff. rank",
    ]
    columns += ["stable rank", share] + (["‖ΔW‖ / ‖W‖", "amplified"] if beside else [])
    rows = []
    for g in found.groups:
        low, high = g.energy_ranks or (0, 0)
        row = [g.target, g.method, g.size, f"{g.sites}", "" if g.r is None else f"{g.r}", number(g.scale)]
        row += [
            f"{g.parameters:,}",
            number(g.norm),
            number(g.top),
            number(g.effective_rank),
            number(g.stable_rank),
        ]
        row.append("" if not high else f"{low}" if low == high else f"{low} to {high}")
        rows.append(row + ([number(g.relative), number(g.amplification)] if beside else []))
    parts = ["<h2>In numbers</h2>", table(columns, rows, left=3)]
    columns = ["weight", "method", "size", "r", "norm", "largest σ", "eff. rank", "stable rank", share]
    columns += ["‖ΔW‖ / ‖W‖", "amplified"] if beside else []
    rows = []
    for t in found.targets.values():
        s, a = t.spectrum, t.amplification
        row = [t.path, t.method, str(t.shape), "" if t.r is None else f"{t.r}"]
        if s is None:
            row += [""] * 5
        else:
            row += [number(v) for v in (s.frobenius, s.top, s.effective_rank, s.stable_rank)]
            row.append(f"{s.energy_rank(found.energy)}")
        rows.append(
            row + ([number(a.relative) if a else "", number(a.factor) if a else ""] if beside else [])
        )
    every = table(columns, rows, left=3)
    parts.append(f"<details><summary>All {len(rows):,} targets</summary>{every}</details>")
    return "".join(parts)


# ---- several adapters
def _overview(adapters: Mapping[str, Analysis]) -> str:
    columns = (
        "adapter",
        "base",
        "targets",
        "parameters",
        "MB",
        "norm",
        "eff. rank",
        "rank by energy, median",
    )
    rows = []
    for name, found in adapters.items():
        ranks = found.ranks.targets.values() if found.ranks else []
        rows.append(
            [
                name,
                found.state.spec.base or "",
                f"{len(found.targets):,}",
                f"{found.state.numel:,}",
                f"{found.state.nbytes / 1e6:,.1f}",
                number(found.norm if ranks else None),
                number(found.effective_rank),
                f"{statistics.median(ranks):g}" if ranks else "",
            ]
        )
    return table(columns, rows, left=2)


def _first(pairs: Mapping[tuple[str, str], Beside]) -> list[tuple[tuple[str, str], Beside]]:
    return list(itertools.islice(pairs.items(), _MOST_PAIRS))


def _pair(first: str, second: str, found: Beside) -> str:
    parts = [f"<h2>{escape(first)} and {escape(second)}</h2>"]
    if not found.inputs:
        return parts[0] + "<p>No target has directions of both.</p>"
    cosine = (
        "" if found.cosine is None else f" The cosine of the changes, as one vector, is {found.cosine:.4f}."
    )
    parts.append(
        f"<p>{len(found.inputs):,} targets in common.{cosine} Below, the subspace similarity φ(i, j): the mean squared "
        f"cosine between the first i directions of {escape(first)} (downwards) and the first j of {escape(second)} "
        "(across), averaged over the targets, and what random directions would have.</p>"
    )
    shown: list[tuple[str, Tensor]] = []
    rows = []
    for title, of in (
        ("Directions that are read", found.inputs),
        ("Directions that are written", found.outputs),
    ):
        mean = mean_similarity(of.values())
        assert mean is not None
        phi, random = mean
        shown.append((title, phi))
        for i, j in dict.fromkeys([(1, 1), tuple(phi.shape)]):
            rows.append([title, f"φ({i}, {j})", f"{phi[i - 1, j - 1]:.3f}", f"{random[i - 1, j - 1]:.3f}"])
    shown.append(("Random directions", random))
    most = max(float(phi.max()) for _, phi in shown)
    parts.append(f'<div class="charts">{"".join(_phi(phi / most, title) for title, phi in shown)}</div>')
    parts.append(f'<p class="legend">φ: 0<span class="bar"></span>{number(most)}</p>')
    parts.append(table(("", "", "found", "random"), rows, left=2, full=False))
    return "".join(parts)


def _phi(phi: Tensor, title: str) -> str:
    rows, columns = (_spread(size) for size in phi.shape)
    values = [[float(phi[i - 1, j - 1]) for j in columns] for i in rows]
    return square(values, rows, columns, title=title)


def _spread(size: int) -> list[int]:
    """1 to the size, or as many of these as a picture has room for."""
    count = min(size, _MOST_CELLS)
    return [1 + round(n * (size - 1) / (count - 1)) for n in range(count)] if count > 1 else [1]


# ---- the cells of a map
def _cells(
    found: Analysis, value: Callable[[TargetAnalysis], float | None], of: Callable[[list[float]], float]
) -> Cells:
    rows = found.by_layer(value)
    return {kind: {layer: of(values) for layer, values in row.items()} for kind, row in rows.items()}


def _map(found: Analysis, cells: Cells, what: str) -> str:
    used = {layer for row in cells.values() for layer in row}
    columns = [layer for layer in found.layers if layer in used]
    return heat_map(cells, columns, _labels(columns), what=what)


def _labels(layers: Sequence[str]) -> list[str]:
    """The layers' numbers where there is one sequence of them, else the end of their paths."""
    containers = {layer.rpartition(".")[0] for layer in layers if layer}
    if len(containers) == 1:
        return [layer.rpartition(".")[2] for layer in layers]
    return [".".join(layer.split(".")[-2:]) for layer in layers]


def _beside_base(found: Analysis) -> list[Amplification]:
    return [t.amplification for t in found.targets.values() if t.amplification is not None]
