"""The documentation's table: written from the results alone, and never from a quick run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import BASE, LORAKIT, PEFT, Aim, Measurement
from benchmarks.table import BEGIN, END, between_markers, main, markdown, read_results, times_less


def result(name: str, *measurements: Measurement, quick: bool = False, threads: int = 1) -> dict[str, Any]:
    return {
        "benchmark": name,
        "question": f"What of {name}?",
        "quick": quick,
        "date": "2026-01-02T03:04:05+00:00",
        "git": {"commit": "abcdef0123456789", "changed": False},
        "machine": {
            "cpu": "A CPU",
            "capability": "AVX2",
            "usable_cores": 2,
            "threads": threads,
            "os": "Linux",
        },
        "versions": {"torch": "2", "peft": None},
        "measurements": [m.to_json() for m in measurements],
    }


LESS = Measurement(
    "load",
    "s",
    {LORAKIT: [0.01] * 3, PEFT: [0.2] * 3, BASE: [0.001] * 3},
    aim=Aim("ratio", ">=", 10),
    note="Mind.",
)
SHARE = Measurement(
    "added", "s", {LORAKIT: [1.0], PEFT: [4.0]}, ratio=(LORAKIT, PEFT), aim=Aim("ratio", "<=", 0.2)
)
MORE = Measurement("slow", "s", {LORAKIT: [4.0], PEFT: [2.0]})


def test_every_figure_comes_from_the_results() -> None:
    text = markdown([result("load", LESS, SHARE, MORE)], image="images/x.png")
    assert "| load<br>(base: 1 ms) | 10 ms | 200 ms | **20x** less (20 to 20) | ≥ 10: met |" in text
    assert "| added | 1 s | 4 s | **0.25** of PEFT's (0.25 to 0.25) | ≤ 0.2: **missed** |" in text
    assert "| slow | 4 s | 2 s | **2x** more (2 to 2) |  |" in text
    assert "Mind." in text
    assert "A CPU (AVX2), 2 cores, 1 torch thread(s)" in text
    assert "abcdef012345." in text


def test_runs_that_differ_are_told_apart() -> None:
    text = markdown([result("load", LESS), result("save", MORE, threads=2)], image="x")
    assert "1 torch thread(s), Linux (load); A CPU (AVX2), 2 cores, 2 torch thread(s), Linux (save)" in text


def test_the_picture_shows_times_less() -> None:
    assert times_less(LESS.to_json()) == pytest.approx((20, 20, 20))
    assert times_less(SHARE.to_json()) == (4, 4, 4)
    nothing_added = Measurement("n", "s", {LORAKIT: [-0.1], PEFT: [1.0]}, ratio=(LORAKIT, PEFT))
    assert times_less(nothing_added.to_json()) is None
    assert times_less(Measurement("n", "s", {LORAKIT: [1.0]}, ratio=None).to_json()) is None
    assert times_less(Measurement("n", "s", {LORAKIT: [1.0], PEFT: [2.0]}, drawn=False).to_json()) is None


def test_only_what_stands_between_the_markers_changes() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = between_markers(page, "new\n")
    assert new == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert between_markers(new, "new\n") == new
    with pytest.raises(ValueError, match="once each"):
        between_markers("no markers", "new\n")


def test_a_quick_run_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make bench"):
        read_results(tmp_path)
    (tmp_path / "load.json").write_text(json.dumps(result("load", LESS, quick=True)))
    with pytest.raises(ValueError, match="--quick run"):
        read_results(tmp_path)
    assert len(read_results(tmp_path, allow_quick=True)) == 1


def test_page_and_picture_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    for name in ("zeta", "save", "load"):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(result(name, LESS, SHARE, MORE)))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    main(["--results", str(tmp_path / "results"), "--page", str(page)])
    text = page.read_text()
    assert text.index("What of save?") < text.index("What of load?") < text.index("What of zeta?")
    assert "](images/benchmarks.png)" in text
    assert (page.parent / "images" / "benchmarks.png").stat().st_size > 5000


def test_the_page_of_the_documentation_has_its_markers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert "x" in between_markers(page, "x\n")
