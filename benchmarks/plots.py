"""Draw the pictures of the training pages from what the benchmarks recorded: ``python -m benchmarks.plots``.

Reads ``train_throughput.json`` and ``train_ablation.json``, whichever is there, from ``benchmarks/studies``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, PEFT, digits, number

HERE = Path(__file__).resolve().parent
BLUE, ORANGE = "#3f51b5", "#e65100"
Result = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=HERE / "studies", metavar="DIR", help="where the JSON files are"
    )
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images", metavar="DIR")
    parser.add_argument(
        "--allow-quick", action="store_true", help="also draw quick runs, which measure nothing"
    )
    options = parser.parse_args(argv)
    found = [name for name in PICTURES if (options.results / f"{name}.json").exists()]
    if not found:
        sys.exit(f"There is none of {', '.join(PICTURES)} in {options.results}: run them with --json first.")
    options.images.mkdir(parents=True, exist_ok=True)
    for name in found:
        result = json.loads((options.results / f"{name}.json").read_text())
        if result["quick"] and not options.allow_quick:
            sys.exit(f"{name} comes from a --quick run and measures nothing.")
        path = options.images / f"{name.replace('_', '-')}.png"
        PICTURES[name](result, path)
        print(f"wrote {path}")


def draw_throughput(result: Result, path: Path) -> None:
    """Both sides' bars, a field for each quantity, the ratio in its title."""
    measurements = result["measurements"]
    figure = _figure(3.2 * min(3, len(measurements)), 2.9 * -(-len(measurements) // 3))
    for place, m in enumerate(measurements, 1):
        axes = figure.add_subplot(-(-len(measurements) // 3), min(3, len(measurements)), place)
        for x, (side, colour) in enumerate(((LORAKIT, BLUE), (PEFT, ORANGE))):
            _bar(axes, x, m["sides"][side], m["unit"], colour)
        axes.set_xticks((0, 1), ("lorakit", "PEFT"))
        ratio = f"\n{m['ratio']['of']} = {digits(m['ratio']['median'])}" if "ratio" in m else ""
        axes.set_title(f"{m['name']} ({m['unit']}){ratio}", fontsize=8)
        _plain(axes)
    figure.savefig(path, dpi=130)


def draw_ablation(result: Result, path: Path) -> None:
    """Times as slow, and times as much memory, without each trick."""
    fields: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
    for m in result["measurements"]:
        trick, what = m["name"].rsplit(": ", 1)
        fields.setdefault(what, []).append((trick, m["ratio"]))
    most = max(len(rows) for rows in fields.values())
    figure = _figure(9, 0.9 + 0.32 * most)
    for place, (what, rows) in enumerate(fields.items(), 1):
        axes = figure.add_subplot(1, len(fields), place)
        for y, (_, ratio) in enumerate(reversed(rows)):
            middle = ratio["median"]
            spread = ([max(0.0, middle - ratio["q1"])], [max(0.0, ratio["q3"] - middle)])
            axes.barh(y, middle - 1, left=1, color=BLUE if middle >= 1 else ORANGE, xerr=spread)
            axes.text(max(middle, 1) + 0.02, y, f"{digits(middle)}x", va="center", fontsize=7)
        names = [trick for trick, _ in reversed(rows)] if place == 1 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{what}: without / with", fontsize=8)
        _plain(axes)
    figure.savefig(path, dpi=130)


def _bar(axes: Any, x: int, figures: Mapping[str, float], unit: str, colour: str) -> None:
    middle = figures["median"]
    spread = ([middle - figures["q1"]], [figures["q3"] - middle])
    axes.bar(x, middle, color=colour, width=0.6, yerr=spread)
    axes.text(x, middle, number(middle, unit), ha="center", va="bottom", fontsize=7)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    return figure


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


PICTURES: Mapping[str, Callable[[Result, Path], None]] = {
    "train_throughput": draw_throughput,
    "train_ablation": draw_ablation,
}


if __name__ == "__main__":
    main()
