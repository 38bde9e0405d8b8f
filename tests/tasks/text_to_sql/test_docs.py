"""The examples in the documentation are the ones that the generator makes."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.tasks.text_to_sql import KINDS, SPLITS, generate, messages, tables

PAGE = (Path(__file__).parents[3] / "docs" / "tasks" / "text-to-sql.md").read_text(encoding="utf-8")


def test_the_examples_are_real_and_show_every_kind():
    examples = {example.id: example for example in generate("test", 400)}
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| (.+) \| `(.+)` \|$", PAGE, re.MULTILINE)
    assert [kind for _, kind, _, _ in rows]
    assert {kind for _, kind, _, _ in rows} == set(KINDS)
    for name, kind, question, sql in rows:
        example = examples[name]
        assert (example.kind, example.question, example.sql) == (kind, question, sql)


def test_the_prompt_is_real():
    example = generate("test", 3)[2]
    assert f"```text\n{messages(example)[0]['content']}\n```" in PAGE
    assert f"`{example.sql}`" in PAGE


def test_the_table_counts_are_real():
    for split in SPLITS:
        assert f"| {split} | {len(tables(split))} |" in PAGE
