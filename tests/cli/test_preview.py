"""``lorakit preview``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import write_rows


def test_rows_with_their_learnt_tokens_and_what_is_counted(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("preview", trained.recipe, "-n", 2, "--start", 2)
    assert outcome.code == 0
    assert "row 2  rows.jsonl:2" in outcome.out
    assert "row 4" not in outcome.out
    assert "⟦green<|im_end|>⟧" in outcome.out
    assert "<|im_start|>user⏎\n1x?<|im_end|>" in outcome.out
    assert "rows      12" in outcome.out
    assert "█" in outcome.out


def test_settings_and_long_rows(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("preview", trained.recipe, "--train.max_length", "30", "-s", "train.overlong=truncate")
    assert "rows are cut" in outcome.out
    assert "longest   31 tokens; train.max_length is 30" in outcome.out


def test_as_json_and_as_a_page(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    outcome = lorakit("preview", trained.recipe, "--split", "test", "--json", "--html", page)
    found = json.loads(outcome.out)
    assert (found["split"], found["rows"], len(found["shown"])) == ("test", 12, 3)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_colours_on_a_terminal(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from lorakit.cli.app import run

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(["preview", str(trained.recipe), "-n", "1"]) == 0
    assert "\x1b[30;42mred<|im_end|>" in terminal.getvalue()  # black on green
    assert "\x1b[36m<|im_start|>user" in terminal.getvalue()  # cyan
    assert "⟦" not in terminal.getvalue()


def test_a_bad_row(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}]
    )
    outcome = lorakit("preview", trained.recipe, "--data.train", rows)
    assert outcome.code == 2
    assert "bad.jsonl, line 2: 'completion' must be text, not int" in outcome.err
