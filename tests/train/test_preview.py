"""Previews: what a run would read, for every kind of row, and as a page."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ConfigError, DataError
from lorakit.train import Recipe
from lorakit.train.preview import histogram, preview
from lorakit.train.preview_page import page, write_page
from tests.tiny_chat import write_rows
from tests.tiny_encoder import save_tiny_encoder

MakeRecipe = Callable[..., Recipe]


def over(
    recipe: MakeRecipe, tmp_path: Path, rows: list[Any], sections: dict[str, Any] | None = None, **train: Any
) -> Recipe:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return recipe(sections={"data": {"train": str(file), "valid": str(file)}, **(sections or {})}, **train)


def test_what_is_counted_is_what_training_reads(recipe: MakeRecipe) -> None:
    found = preview(recipe(max_length=31), rows=2, start=3)
    assert [row.number for row in found.rows] == [3, 4]
    assert found.total + found.dropped == 24
    assert found.dropped > 0
    assert found.share == found.learnt / found.tokens
    assert sum(bar.rows for bar in found.histogram) == found.total
    assert (found.unit, found.max_length) == ("token", 31)
    assert set(found.roles) == {"user", "assistant"}
    (shown,) = found.rows[0].strands
    said = "".join(piece.text for piece in shown.pieces if piece.learnt)
    assert said.endswith("<|im_end|>")
    assert found.rows[0].learnt == sum(shown.strand.learnt)
    plain = found.plain()
    assert plain["shown"][0]["strands"][0]["text"].startswith("<|im_start|>user")
    assert plain["lost_tokens"] > 0


def test_cut_rows_and_lost_tokens(recipe: MakeRecipe) -> None:
    whole, cut = preview(recipe()), preview(recipe(max_length=30, overlong="truncate"))
    assert cut.truncated > 0
    assert cut.lost == whole.tokens - cut.tokens


def test_what_training_refuses_is_refused_with_its_place(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: 'completion' is empty"):
        preview(
            over(recipe, tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
        )
    with pytest.raises(ConfigError, match="There is no row 99: the train split has 24"):
        preview(recipe(), start=99)
    with pytest.raises(ConfigError, match=r"set data\.valid"):
        preview(recipe(), "valid")


def test_pairs_of_answers(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    found = preview(over(recipe, tmp_path, rows, {"task": "dpo"}))
    first, second = found.rows[0].strands
    assert (first.strand.name, second.strand.name) == ("chosen", "rejected")
    assert "".join(piece.text for piece in second.pieces if piece.learnt) == "bad<|im_end|>"
    assert found.share is None


def test_labels(recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    rows = [{"text": "the cat", "label": "x"}, {"text": "a dog", "label": "y"}]
    made = over(recipe, tmp_path, rows, {"task": "classification", "model": str(folder), "adapter": {"r": 2}})
    for split in ("train", "valid"):
        found = preview(made, split)  # type: ignore[arg-type]
        assert [row.strands[0].strand.note for row in found.rows] == ["label x", "label y"]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_every_length_is_in_one_bar(lengths: list[int]) -> None:
    bars = histogram(lengths)
    assert 1 <= len(bars) <= 12
    assert sum(bar.rows for bar in bars) == len(lengths)
    assert (bars[0].low, bars[-1].high) == (min(lengths), max(lengths))
    for bar in bars:
        assert bar.rows == sum(bar.low <= length <= bar.high for length in lengths)


class Reader(HTMLParser):
    """The texts of the tokens, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.learnt = ""
        self.titles: list[str] = []
        self._inside: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "meta":
            return
        given = dict(attrs)
        self.open.append(tag)
        self._inside.append("learnt" in (given.get("class") or "") and "title" in given)
        if "title" in given:
            self.titles.append(str(given["title"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if any(self._inside):
            self.learnt += data


def test_the_page_is_whole_and_escapes_what_rows_say(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"prompt": "<script>alert(1)</script>", "completion": "a < b & c"}]
    found = preview(over(recipe, tmp_path, rows))
    html = page(found, "<title>")
    assert "<script>" not in html
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert reader.learnt == "a < b & c<|im_end|>"
    assert reader.titles[-1] == "2 assistant learnt"
    write_page(found, tmp_path / "p.html", title="x")
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == page(found, "x")
    with pytest.raises(ConfigError, match="no folder"):
        write_page(found, tmp_path / "no" / "p.html", title="x")
