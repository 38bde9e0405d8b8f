"""Tables: every form, plain and gzipped, and what is said about a damaged one."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.train.data_sections import TableFormat
from lorakit.train.tables import file_rows

ROWS = [{"text": 'A "b", c', "label": "x"}, {"text": "d", "label": "y"}, {"text": "e\nf", "label": "x"}]
FORMS = {
    "r.jsonl": '{"text": "A \\"b\\", c", "label": "x"}\n\n{"text": "d", "label": "y"}\n'
    '{"text": "e\\nf", "label": "x"}\n',
    "r.json": '[{"text": "A \\"b\\", c", "label": "x"}, {"text": "d", "label": "y"}, {"text": "e\\nf", "label": "x"}]',
    "r.csv": '\ufefftext,label\r\n"A ""b"", c",x\r\n\r\nd,y\r\n"e\nf",x\r\n',
}


def read_table(
    path: Path, kind: TableFormat = "auto", most: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((str(place), row) for place, row in file_rows(path, kind, most))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("zipped", [False, True])
def test_the_same_rows_from_every_form(tmp_path: Path, name: str, zipped: bool) -> None:
    content = FORMS[name].encode()
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    found = list(read_table(path))
    assert [row for _, row in found] == ROWS
    assert [row for _, row in read_table(path, most=2)] == ROWS[:2]
    places = [place.removeprefix(f"{path}, ") for place, _ in found]
    expected = {"r.jsonl": ["line 1", "line 3", "line 4"], "r.json": ["row 1", "row 2", "row 3"]}
    assert places == expected.get(name, ["line 2", "line 4", "line 6"])


def test_tabs_separate_and_quotes_are_text(tmp_path: Path) -> None:
    path = tmp_path / "r.tsv"
    path.write_text('text\tlabel\nsay "no, never\t1\n', encoding="utf-8")
    assert [row for _, row in read_table(path)] == [{"text": 'say "no, never', "label": "1"}]


def test_the_form_can_be_named_where_the_ending_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ending of rows\.txt does not tell.*data\.format"):
        read_table(path)
    assert list(read_table(path, "csv")) == [(f"{path}, line 2", {"text": "a", "label": "b"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"text,label\na,b,c\n", r"line 2: 3 values for 2 columns \(text, label\)"),
        ("r.csv", b"text,text\na,b\n", "line 1: two columns have the same name"),
        ("r.csv", b"text,label\n", "has no rows"),
        ("r.csv", b"", "has no rows"),
        ("r.csv", b'text,label\n"a,b\n', "unexpected end of data"),
        ("r.csv", b"text,label\na,\xff\n", "line 2: not UTF-8"),
        ("r.csv.gz", gzip.compress(b"text,label\n" + b"a,b\n" * 99, mtime=0)[:-9], "damaged or cut off"),
        ("r.json", b"{}", "expected a list of one or more objects, found dict"),
        ("r.json", b"[]", "found an empty list"),
        ("r.json", b"[{}, 3]", "row 2: expected an object with named values, found int"),
        ("r.json", b"[", "not valid JSON"),
        ("r.jsonl", b"[1]\n", "line 1: expected an object"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_table(path))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no data file .*tran\.csv\. Did you mean 'train\.csv'"):
        read_table(tmp_path / "tran.csv")
