"""Turn the JSON of the benchmarks into the table and the picture of ``docs/benchmarks.md``.

The page holds no figure typed by hand: everything between its two markers is written here, from
``benchmarks/results/*.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import NAMES
from benchmarks.harness import LORAKIT, PEFT, digits, number

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="DIR", help="where the JSON files are"
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md", metavar="FILE")
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="default: images/benchmarks.png beside the page"
    )
    parser.add_argument(
        "--allow-quick", action="store_true", help="also show quick runs, which measure nothing"
    )
    options = parser.parse_args(argv)
    image = options.image or options.page.parent / "images" / "benchmarks.png"
    try:
        results = read_results(options.results, allow_quick=options.allow_quick)
        text = markdown(results, image=image.relative_to(options.page.parent).as_posix())
        page = between_markers(options.page.read_text(), text)
    except ValueError as error:
        sys.exit(f"{error}")
    draw(results, image)
    options.page.write_text(page)
    print(f"wrote {options.page} and {image}")


def read_results(directory: Path, *, allow_quick: bool = False) -> list[Result]:
    """The results in a directory, in the order in which the benchmarks are run.

    Raises:
        ValueError: There is none, or one comes from a quick run.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    if not found:
        raise ValueError(f"There is no result in {directory}: run `make bench` first.")
    quick = [name for name, result in found.items() if result["quick"]]
    if quick and not allow_quick:
        raise ValueError(
            f"These come from a --quick run and measure nothing: {', '.join(quick)}. Run `make bench`."
        )
    known = [name for name in NAMES if name in found]
    return [found[name] for name in (*known, *(name for name in found if name not in known))]


# ---- text -----------------------------------------------------------------------------------------------------------
def markdown(results: Sequence[Result], *, image: str) -> str:
    """A picture, and a table for each question."""
    lines = [f"![How many times less than PEFT each operation costs]({image})", "", *where(results), ""]
    for result in results:
        lines += [
            f"**{result['question']}**",
            "",
            "| | lorakit | PEFT | ratio, and its middle half | aim |",
            "|---|---:|---:|---|---|",
            *(row(m) for m in result["measurements"]),
            "",
        ]
        notes = dict.fromkeys(m["note"] for m in result["measurements"] if "note" in m)
        lines += [line for note in notes for line in (note, "")]
    return "\n".join(lines).rstrip() + "\n"


def where(results: Sequence[Result]) -> list[str]:
    """The machine, the versions and the dates, once where all agree."""
    lines = []
    for what, show in (
        ("Machine", _machine),
        ("Versions", _versions),
        ("Revision", _revision),
        ("Date", _date),
    ):
        told: dict[str, list[str]] = {}
        for result in results:
            told.setdefault(show(result), []).append(result["benchmark"])
        if len(told) == 1:
            lines.append(f"{what}: {next(iter(told))}.  ")
        else:
            each = "; ".join(f"{text} ({', '.join(names)})" for text, names in told.items())
            lines.append(f"{what}: {each}.  ")
    return lines


def row(measurement: Mapping[str, Any]) -> str:
    """One measurement as a row of the table: medians, with what other sides took below the name."""
    sides, unit = measurement["sides"], measurement["unit"]
    others = [f"{s}: {number(v['median'], unit)}" for s, v in sides.items() if s not in (LORAKIT, PEFT)]
    name = measurement["name"] + (f"<br>({', '.join(others)})" if others else "")
    cells = [number(sides[s]["median"], unit) if s in sides else "" for s in (LORAKIT, PEFT)]
    return f"| {name} | {cells[0]} | {cells[1]} | {_ratio(measurement)} | {_aim(measurement)} |"


def between_markers(page: str, text: str) -> str:
    """The page with the text in place of what stood between its markers.

    Raises:
        ValueError: The page has not exactly one pair of markers, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"The page must hold the lines {BEGIN} and {END} once each, in this order.")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}"


def _ratio(measurement: Mapping[str, Any]) -> str:
    if "ratio" not in measurement:
        return ""
    r = measurement["ratio"]
    if r["of"] == f"{LORAKIT} / {PEFT}":
        return f"**{r['median']:.2f}** of PEFT's ({r['q1']:.2f} to {r['q3']:.2f})"
    if r["median"] >= 1:
        return f"**{digits(r['median'])}x** less ({digits(r['q1'])} to {digits(r['q3'])})"
    return f"**{digits(1 / r['median'])}x** more ({digits(1 / r['q3'])} to {digits(1 / r['q1'])})"


def _aim(measurement: Mapping[str, Any]) -> str:
    if "aim" not in measurement:
        return ""
    aim = measurement["aim"]
    of = "" if aim["of"] == "ratio" else f"{aim['of']} "
    relation = {">=": "≥", "<=": "≤"}[aim["relation"]]
    return f"{of}{relation} {aim['value']:.3g}: {'met' if aim['met'] else '**missed**'}"


def _machine(result: Result) -> str:
    m = result["machine"]
    return f"{m['cpu']} ({m['capability']}), {m['usable_cores']} cores, {m['threads']} torch thread(s), {m['os']}"


def _versions(result: Result) -> str:
    return ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v is not None)


def _revision(result: Result) -> str:
    git = result["git"]
    return "unknown" if git is None else git["commit"][:12] + (" with changes" if git["changed"] else "")


def _date(result: Result) -> str:
    return str(result["date"])[:10]


# ---- picture --------------------------------------------------------------------------------------------------------
def times_less(measurement: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """How many times less lorakit costs, median and quartiles; None where nothing is to be drawn."""
    if "ratio" not in measurement or not measurement["drawn"]:
        return None
    r = measurement["ratio"]
    values = (r["median"], r["q1"], r["q3"])
    if r["of"] == f"{LORAKIT} / {PEFT}":
        if min(values) <= 0:
            return None
        values = (1 / values[0], 1 / values[2], 1 / values[1])
    return values if min(values) > 0 else None


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of the ratios on a logarithmic axis, PEFT at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [
        (m["name"], t)
        for result in results
        for m in result["measurements"]
        if (t := times_less(m)) is not None
    ]
    shown.reverse()  # the first at the top
    figure = Figure(figsize=(9, 0.9 + 0.2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set to
    axes = figure.add_subplot()
    middle = [t[0] for _, t in shown]
    low, high = [t[0] - t[1] for _, t in shown], [t[2] - t[0] for _, t in shown]
    # A bar on a logarithmic axis starts where nothing differs, at 1, and goes right for better and left for worse.
    axes.barh(
        range(len(shown)),
        [m - 1 for m in middle],
        left=1,
        color=["#3f51b5" if m >= 1 else "#e65100" for m in middle],
        xerr=(low, high),
        error_kw={"elinewidth": 1, "ecolor": "#555"},
    )
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    for y, (_, (median, _, most)) in enumerate(shown):
        axes.text(max(most, 1) * 1.15, y, f"{digits(median)}x", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *(m * 0.7 for m in middle)]), max([10.0, *middle]) * 6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times less than PEFT (log scale; median, bars: middle half of the rounds)", fontsize=8)
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
