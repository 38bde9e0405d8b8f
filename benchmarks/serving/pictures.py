"""Pictures for the docs from results: ``python -m benchmarks.serving.pictures FILE... --to DIR``.

| result of | picture |
|---|---|
| ``serve_throughput`` | ``serving-engines.png``: tokens a second of each engine over the number of adapters |
| ``serve_shapes`` | ``serving-shapes.png``: tokens a second over the number of adapters, a line for each shape |
| ``serve_cold`` | ``serving-cold.png``: the first token of a hot and of a cold adapter |
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LOAD = re.compile(r"(?:(?P<model>[^:]+): )?(?P<n>\d+) adapters, uniform")
_NAME = re.compile(r"(?P<model>[^,]+), (?P<n>\d+) adapters(?:, (?P<shape>\w+))?")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.pictures", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--to", type=Path, default=Path("docs/images"), metavar="DIR")
    options = parser.parse_args(argv)
    drawers: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], None]]] = {
        "serve_throughput": ("serving-engines.png", _engines),
        "serve_shapes": ("serving-shapes.png", _shapes),
        "serve_cold": ("serving-cold.png", _cold),
    }
    for path in options.results:
        result = json.loads(path.read_text())
        if result["benchmark"] not in drawers:
            raise SystemExit(
                f"{path} is of {result['benchmark']}; there are pictures of {', '.join(drawers)}."
            )
        name, draw = drawers[result["benchmark"]]
        _picture(options.to / name, result, draw)
        print(f"wrote {options.to / name}")


def _picture(path: Path, result: Mapping[str, Any], draw: Callable[[Any, Mapping[str, Any]], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    draw(figure, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _engines(figure: Any, result: Mapping[str, Any]) -> None:
    """A panel for each model, a line for each engine."""
    lines: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in result["measurements"]:
        found = _LOAD.fullmatch(row["name"])
        if found is not None:
            for side, speeds in row["sides"].items():
                lines[found["model"] or "SmolLM2-135M"][side][int(found["n"])] = speeds["median"]
    engines = list(dict.fromkeys(side for sides in lines.values() for side in sides))
    counts = sorted({n for sides in lines.values() for points in sides.values() for n in points})
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (model, sides) in zip(panels, lines.items(), strict=True):
        for side, points in sides.items():
            own = {
                "color": f"C{engines.index(side)}",
                "marker": "o",
                "linewidth": 2.5 if side == "lorakit" else 1.2,
            }
            axes.plot(
                [counts.index(n) for n in sorted(points)],
                [points[n] for n in sorted(points)],
                label=side,
                **own,
            )
        axes.set_xticks(range(len(counts)), [str(n) for n in counts])
        axes.set(xlabel="adapters", ylabel="tokens a second", title=model)
        axes.set_ylim(bottom=0)
    handles = {
        label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")


def _shapes(figure: Any, result: Mapping[str, Any]) -> None:
    """A panel for each model; the dashed line is the base without adapters."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    bare: dict[str, float] = {}
    for row in result["measurements"]:
        found = _NAME.fullmatch(row["name"])
        if found is None:
            continue  # a tax, which is read from these
        speed = row["sides"]["lorakit"]["median"]
        if found["shape"] is None:
            bare[found["model"]] = speed
        else:
            lines[found["model"]][found["shape"]].append((int(found["n"]), speed))
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (model, shapes) in zip(panels, lines.items(), strict=True):
        for shape, points in shapes.items():
            points.sort()
            axes.plot([n for n, _ in points], [speed for _, speed in points], marker="o", label=shape)
        if model in bare:
            axes.axhline(bare[model], linestyle="--", color="grey", label="no adapter")
        counts = sorted({n for points in shapes.values() for n, _ in points})
        axes.set(xscale="log", xlabel="adapters", ylabel="tokens a second", title=model)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * max(line.get_ydata()[0] for line in axes.get_lines()))
        axes.legend()


def _cold(figure: Any, result: Mapping[str, Any]) -> None:
    rows = [row for row in result["measurements"] if row["name"].startswith("first token")]
    axes = figure.subplots()
    for offset, side in ((-0.2, "hot"), (0.2, "cold")):
        heights = [1000 * row["sides"][side]["median"] for row in rows]
        axes.bar([place + offset for place in range(len(rows))], heights, 0.38, label=side)
    axes.set_xticks(
        range(len(rows)), [row["name"].removeprefix("first token, ").replace(", ", "\n") for row in rows]
    )
    axes.set(ylabel="first token, ms")
    axes.legend()


if __name__ == "__main__":
    main()
