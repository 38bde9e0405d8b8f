"""Labelled texts: what is read, which labels there are, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.train.data_sections import LabelledData
from lorakit.train.labelled import LabelledText, label_names, load_texts, tokenize
from tests.tiny_chat import write_rows
from tests.tiny_encoder import tiny_word_tokenizer


def texts(*labels: str, text: str = "the cat") -> list[LabelledText]:
    return [LabelledText(f"line {i}", text, None, label) for i, label in enumerate(labels, 1)]


def read(tmp_path: Path, rows: list[Any], **settings: Any) -> list[LabelledText]:
    return load_texts(LabelledData(train=write_rows(tmp_path / "r.jsonl", rows), **settings), "train")


def test_one_text_or_two_under_any_names(tmp_path: Path) -> None:
    rows = [{"q": "a", "r": "b", "y": 3, "other": None}, {"q": "c", "r": "d", "y": "x"}]
    found = read(tmp_path, rows, text="q", second_text="r", label="y")
    assert [(t.text, t.second, t.label) for t in found] == [("a", "b", "3"), ("c", "d", "x")]
    assert found[1].place.endswith("r.jsonl, line 2")
    assert read(tmp_path, rows, text="q", label="y", max_rows={"train": 1})[0].second is None


def test_labels_are_in_the_order_of_their_numbers_or_of_the_alphabet() -> None:
    assert label_names(texts("10", "9", "-1")) == ("-1", "9", "10")
    assert label_names(texts("b", "10", "9")) == ("10", "9", "b")
    with pytest.raises(DataError, match="All 2 rows to train on have the label 'a'"):
        label_names(texts("a", "a"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"line 1: 'label' is missing\. The row has: text\. data\.label names the column"),
        ({"txt": "a", "label": "x"}, r"line 1: 'text' is missing\. Did you mean 'txt'\?"),
        ({"text": " ", "label": "x"}, "line 1: 'text' is empty"),
        ({"text": 3, "label": "x"}, "line 1: 'text' must be text, not int"),
        ({"text": "a", "label": 0.5}, r"line 1: 'label' must be a word or a whole number; found 0\.5"),
        ({"text": "a", "label": True}, "must be a word or a whole number; found True"),
        ({"text": "a", "label": None}, "must be a word or a whole number; found None"),
        ({"text": "a", "label": " "}, "line 1: 'label' is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


def test_a_split_that_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.test"):
        load_texts(LabelledData(train=tmp_path / "x.csv"), "test")


def test_rows_know_their_label_and_which_text_a_token_is_of() -> None:
    tokenizer = tiny_word_tokenizer()
    pair = LabelledText("line 1", "the cat", "a dog", "b")
    made = tokenize([pair, *texts("a")], ("a", "b"), tokenizer, max_length=50)
    assert [row.labels for row in made.rows] == [(1,), (0,)]
    assert made.rows[0].types == (0, 0, 0, 0, 1, 1, 1)
    assert (made.tokens, made.longest, made.learnt) == (11, 7, 2)
    assert "2 labels: a 50 %, b 50 %" in str(made)


def test_an_unknown_label_is_named_with_its_line() -> None:
    with pytest.raises(
        DataError, match=r"line 2: the label 'anmal' is none of.*Did you mean 'animal'\?.*animal, tree"
    ):
        tokenize(texts("tree", "anmal"), ("animal", "tree"), tiny_word_tokenizer(), max_length=9)


def test_long_rows_are_cut_left_out_or_refused_and_counted() -> None:
    rows = [*texts("a"), *texts("b", text="the cat and the dog")]
    tokenizer = tiny_word_tokenizer()
    cut = tokenize(rows, ("a", "b"), tokenizer, max_length=5, overlong="truncate")
    assert [len(row.ids) for row in cut.rows] == [4, 5]
    assert (cut.truncated, cut.dropped, cut.longest) == (1, 0, 7)
    assert cut.rows[1].ids[-1] == tokenizer.sep_token_id
    left = tokenize(rows, ("a", "b"), tokenizer, max_length=5, overlong="drop")
    assert (len(left.rows), left.dropped) == (1, 1)
    assert "1 longer rows left out" in str(left)
    with pytest.raises(DataError, match=r"1 rows are too long: line 1\. The longest has 7 tokens; at most 5"):
        tokenize(rows, ("a", "b"), tokenizer, max_length=5, overlong="error")
    with pytest.raises(DataError, match="No row is left: all 2 are too long"):
        tokenize(rows, ("a", "b"), tokenizer, max_length=2, overlong="drop")


def test_never_more_than_the_tokenizer_says_its_model_reads() -> None:
    made = tokenize(texts("a", "b", text="cat " * 100), ("a", "b"), tiny_word_tokenizer(), max_length=1000)
    assert {len(row.ids) for row in made.rows} == {64}
