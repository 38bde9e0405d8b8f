"""Tables and small charts as HTML and SVG that take their colours from the page, for light and dark alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

Cells = Mapping[str, Mapping[str, float]]
"""Row to column to value."""

_MOST_NUMBERS = 14  # columns of a heat map that leave room for a number in each cell
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 262, 168, 34, 30, 8  # of a line chart


def number(value: float | None, digits: int = 3) -> str:
    """A number of a few digits, ``"12,300"``, ``"0.0123"``, whole ones without a point; empty for None."""
    if value is None:
        return ""
    if value == float("inf"):
        return "∞"
    if abs(value) < 1e6 and value == int(value):
        return f"{value:,.0f}"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, full: bool = True) -> str:
    """A plain table that scrolls sideways where it is too wide.

    Args:
        columns: The heads.
        rows: Of cells.
        left: How many columns at the left are text.
        full: Whether it takes the whole width of the page.
    """
    sides = [' class="text"' if n < left else "" for n in range(len(columns))]
    head = "".join(f"<th{side}>{escape(name)}</th>" for side, name in zip(sides, columns, strict=True))
    body = []
    for row in rows:
        first, *rest = (escape(cell) for cell in row)
        cells = "".join(f"<td{side}>{cell}</td>" for side, cell in zip(sides[1:], rest, strict=True))
        body.append(f'<tr><th class="text" scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="plain{" full" if full else ""}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def heat_map(
    cells: Cells, columns: Sequence[str], labels: Sequence[str], *, what: str, corner: str = "layer"
) -> str:
    """A table of coloured cells, with its scale below; numbers stand in the cells where there is room.

    Args:
        cells: What to show.
        columns: The columns, in order.
        labels: What stands over each; where there are many, only some are shown.
        what: What the values are, for the scale.
        corner: What the columns are.
    """
    values = [value for row in cells.values() for value in row.values() if value != float("inf")]
    if not values:
        return ""
    high = max(values)
    roomy = len(columns) <= _MOST_NUMBERS
    step = 1 if roomy else 4
    shown = [label if n % step == 0 or not label.isdecimal() else "" for n, label in enumerate(labels)]
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in shown)
    rows = []
    for name, row in cells.items():
        line = []
        for column, label in zip(columns, labels, strict=True):
            if column not in row:
                line.append('<td class="none"></td>')
                continue
            share = min(1.0, row[column] / (high or 1.0))
            text = number(row[column], 2)
            place = f"{name}, {label}" if label else name
            line.append(
                f'<td{" class=high" if share > 0.66 else ""} style="--v:{share:.2f}" '
                f'title="{escape(place)}: {number(row[column])}">{text if roomy else ""}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(line)}</tr>')
    return (
        f'<div class="scroll"><table class="heat{" roomy" if roomy else ""}">'
        f"<thead><tr><th>{escape(corner)}</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="legend">{escape(what)}: 0<span class="bar"></span>{number(high)}</p>'
    )


def curves(
    lines: Mapping[str, Sequence[float]], *, title: str, note: str, across: str, aim: float | None = None
) -> str:
    """A chart of lines that rise from 0 to 1 over 1, 2, 3 ...; later lines are drawn stronger.

    Args:
        lines: Name of each line to its values.
        title: Over the chart.
        note: Beside the title.
        across: What is counted below.
        aim: A height to mark.
    """
    most = max(len(values) for values in lines.values())
    wide, tall = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - _TOP

    def x(k: float) -> float:
        return _LEFT + (wide * (k - 1) / (most - 1) if most > 1 else wide / 2)

    def y(value: float) -> float:
        return _TOP + tall * (1 - value)

    parts = [
        f'<path class="axis" d="M{_LEFT} {y(v):.1f}H{_WIDTH - 8}"/>'
        f'<text x="{_LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in (0.0, 0.5, 1.0)
    ]
    if aim is not None:
        parts.append(f'<path class="aim" d="M{_LEFT} {y(aim):.1f}H{_WIDTH - 8}"/>')
    for n, (name, values) in enumerate(lines.items()):
        strength = 0.3 + 0.7 * n / max(1, len(lines) - 1)
        points = " ".join(f"{x(k):.1f},{y(value):.1f}" for k, value in enumerate(values, 1))
        shape = (
            f'<polyline class="curve" points="{points}"'
            if len(values) > 1
            else f'<circle class="curve" cx="{x(1):.1f}" cy="{y(values[0]):.1f}" r="2"'
        )
        end = "polyline" if len(values) > 1 else "circle"
        parts.append(f'{shape} opacity="{strength:.2f}"><title>{escape(name)}</title></{end}>')
    ticks = [1, most] if most < 4 else [1, (most + 1) // 2, most]
    for k in dict.fromkeys(ticks):
        parts.append(f'<text x="{x(k):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{k}</text>')
    parts.append(
        f'<text x="{_LEFT + wide / 2:.0f}" y="{_HEIGHT - 1}" text-anchor="middle">{escape(across)}</text>'
    )
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def square(
    values: Sequence[Sequence[float]], rows: Sequence[int], columns: Sequence[int], *, title: str
) -> str:
    """A square picture of a matrix of shares, 0 to 1.

    Args:
        values: The matrix, rows downwards.
        rows: What each row is called.
        columns: What each column is called.
        title: Over the picture.
    """
    side, left, top = 200, 26, 4
    wide, tall = side / len(columns), side / len(rows)
    cells = "".join(
        f'<rect x="{left + n * wide:.2f}" y="{top + m * tall:.2f}" width="{wide:.2f}" height="{tall:.2f}" '
        f'fill-opacity="{value:.2f}"><title>{i}, {j}: {value:.3f}</title></rect>'
        for m, (i, row) in enumerate(zip(rows, values, strict=True))
        for n, (j, value) in enumerate(zip(columns, row, strict=True))
    )
    texts = [
        f'<text x="{left + (n + 0.5) * wide:.1f}" y="{top + side + 13}" text-anchor="middle">{columns[n]}</text>'
        for n in sorted({0, len(columns) - 1})
    ]
    texts += [
        f'<text x="{left - 5}" y="{top + (m + 0.5) * tall + 4:.1f}" text-anchor="end">{rows[m]}</text>'
        for m in sorted({0, len(rows) - 1})
    ]
    width, height = left + side + 6, top + side + 18
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><rect class="ground" x="{left}" y="{top}" width="{side}" height="{side}"/>'
        f'<g class="cells" shape-rendering="crispEdges">{cells}</g>{"".join(texts)}</svg></figure>'
    )
