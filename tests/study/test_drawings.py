"""Tables and charts as HTML."""

from __future__ import annotations

import re

import pytest

from lorakit.study.drawings import curves, heat_map, number, square, table


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (3.0, "3"), (1234.0, "1,234"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"),
     (1e-6, "1.00e-06"), (2.5e7, "2.50e+07"), (float("inf"), "∞"), (99.99, "100"), (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_table_escapes_its_cells() -> None:
    drawn = table(("a<", "b"), [["x&", "1"]], left=1)
    assert "<th>a" not in drawn
    assert "a&lt;" in drawn
    assert "x&amp;" in drawn
    assert drawn.count("<td") == 1


def test_the_colour_of_a_cell_is_its_share_of_the_largest() -> None:
    drawn = heat_map(
        {"q": {"l.0": 1.0, "l.1": 4.0}, "v": {"l.0": 2.0}}, ["l.0", "l.1"], ["0", "1"], what="norm"
    )
    assert re.findall(r"--v:([0-9.]+)", drawn) == ["0.25", "1.00", "0.50"]
    assert 'class="none"' in drawn
    assert 'title="v, 0: 2"' in drawn
    assert "norm: 0" in drawn
    assert heat_map({}, [], [], what="norm") == ""


def test_infinity_has_the_strongest_colour() -> None:
    drawn = heat_map({"q": {"a": float("inf"), "b": 1.0}}, ["a", "b"], ["a", "b"], what="factor")
    assert re.findall(r"--v:([0-9.]+)", drawn) == ["1.00", "1.00"]


def test_curves_stay_inside_the_chart() -> None:
    drawn = curves({"a": [0.2, 0.7, 1.0], "b": [1.0]}, title="q", note="", across="directions", aim=0.9)
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    for pair in points[1].split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 262
        assert 0 <= y <= 168
    assert "<circle" in drawn
    assert drawn.count('class="aim"') == 1


def test_a_square_has_a_cell_for_each_pair() -> None:
    drawn = square([[0.0, 0.5, 1.0], [0.25, 0.5, 0.75]], [1, 2], [1, 2, 3], title="phi")
    assert re.findall(r'fill-opacity="([0-9.]+)"', drawn) == ["0.00", "0.50", "1.00", "0.25", "0.50", "0.75"]
    assert "<title>2, 3: 0.750</title>" in drawn
