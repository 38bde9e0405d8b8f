"""Examples are reproducible, different, executable, and hard to get right by mistake."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys

import pytest

from lorakit.errors import ConfigError, ExecutionError
from lorakit.tasks.execution import execution_accuracy, run, same_result
from lorakit.tasks.text_to_sql import KINDS, SPLITS, generate
from lorakit.tasks.text_to_sql.schema import Category, Key

EXAMPLES = {split: generate(split, 400) for split in SPLITS}
ALL = [example for examples in EXAMPLES.values() for example in examples]


def digest(examples):
    """One number for everything in some examples."""
    text = repr([(e.id, e.kind, e.table.name, e.question, e.sql, e.rows, e.ordered) for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def test_another_process_with_another_hash_seed_makes_the_same_examples():
    code = (
        "import hashlib; from lorakit.tasks.text_to_sql import generate\n"
        "text = repr([(e.id, e.kind, e.table.name, e.question, e.sql, e.rows, e.ordered)"
        " for s in ('train', 'valid', 'test') for e in generate(s, 400)])\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert printed.stdout.strip() == digest(ALL)


def test_fewer_examples_are_the_beginning_of_more():
    assert generate("test", 30) == EXAMPLES["test"][:30]


def test_the_seed_changes_the_questions():
    first, second = ({e.question for e in generate("train", 200, seed)} for seed in (0, 1))
    assert len(first & second) < 40


@pytest.mark.parametrize("split", SPLITS)
def test_all_ids_and_questions_of_a_split_differ(split):
    examples = EXAMPLES[split]
    assert len({e.id for e in examples}) == len({e.question.lower() for e in examples}) == 400


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_splits_share_no_table_and_no_question(one, other):
    assert not {e.table.name for e in EXAMPLES[one]} & {e.table.name for e in EXAMPLES[other]}
    assert not {e.question.lower() for e in EXAMPLES[one]} & {e.question.lower() for e in EXAMPLES[other]}


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_is_there(split):
    assert {e.kind for e in EXAMPLES[split]} == set(KINDS)


def test_gold_rows_are_what_the_gold_sql_returns_and_say_something():
    for e in ALL:
        assert e.sql == e.query.sql()
        assert e.rows == run(e.table.connect(), e.sql)
        assert e.rows
        assert all(value is not None for row in e.rows for value in row)
        assert e.ordered == ("ORDER BY" in e.sql)
    assert execution_accuracy([e.sql for e in ALL], [e.case() for e in ALL]).accuracy == 1


def test_a_limit_never_cuts_through_a_tie():
    for e in ALL:
        if e.query.limit:
            wider = e.sql.replace(f"LIMIT {e.query.limit}", f"LIMIT {e.query.limit + 1}")
            key = re.search(r"ORDER BY (\S+)", e.sql).group(1)
            keys = run(e.table.connect(), re.sub(r"SELECT .*? FROM", f"SELECT {key} FROM", wider))
            assert len(keys) == e.query.limit + 1
            assert len(set(keys)) == len(keys)


def mistakes(example):
    """Wrong queries made from the SQL text alone, without the generator's own notion of a mistake."""
    sql, columns = example.sql, example.table.columns
    yield re.sub(r" WHERE .*?(?= GROUP| ORDER|$)", "", sql)
    yield re.sub(r" AND .*?(?= GROUP| ORDER|$)", "", sql)
    yield re.sub(r"WHERE .*? AND ", "WHERE ", sql)
    yield re.sub(r" ORDER BY \S+ (ASC|DESC)", "", sql)
    yield re.sub(r" LIMIT \d+", "", sql)
    yield re.sub(r" HAVING .*", "", sql)
    for right, wrong in (
        ("MIN(", "MAX("), ("MAX(", "MIN("), ("AVG(", "SUM("), ("SUM(", "AVG("), ("SUM(", "COUNT("), ("COUNT(*)", "*"),
        ("DESC", "ASC"), ("ASC", "DESC"), (" > ", " < "), (" < ", " > "), (" > ", " >= "), (" < ", " <= "),
        (" >= ", " > "), (" <= ", " < "), (" >= ", " = "), ("DISTINCT ", ""), ("LIMIT 1", "LIMIT 2"),
    ):  # fmt: skip
        yield sql.replace(right, wrong)
    for column, other in itertools.permutations(columns, 2):
        if isinstance(column, Key | Category) == isinstance(other, Key | Category):
            for clause in (
                "SELECT ",
                "SELECT MAX(",
                "SELECT AVG(",
                "SELECT MIN(",
                "SELECT SUM(",
                "WHERE ",
                "AND ",
                "ORDER BY ",
            ):
                yield re.sub(rf"{re.escape(clause)}{column.name}\b", clause + other.name, sql)


def test_a_mistaken_query_seldom_gives_the_right_result():
    tried = unchanged = 0
    for e in ALL:
        connection = e.table.connect()
        for mistaken in {m for m in mistakes(e) if m != e.sql}:
            try:
                rows = run(connection, mistaken)
            except ExecutionError:
                continue
            tried += 1
            unchanged += same_result(rows, e.rows, e.ordered)
        connection.close()
    assert tried > 5 * len(ALL)
    assert unchanged / tried < 0.01


@pytest.mark.parametrize(
    "sql", ["SELECT {key} FROM {table}", "SELECT COUNT(*) FROM {table}", "SELECT * FROM {table}"]
)
def test_one_answer_for_every_question_scores_next_to_nothing(sql):
    answers = [sql.format(key=e.table.key.name, table=e.table.name) for e in ALL]
    assert execution_accuracy(answers, [e.case() for e in ALL]).accuracy < 0.03


def test_too_many_questions_are_an_error_that_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr("lorakit.tasks.text_to_sql.examples._DRY_SPELL", 3)
    with pytest.raises(ConfigError, match=r"100000 questions of the valid split .* only \d+ different"):
        generate("valid", 100_000)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="unknown split"):
        generate("dev", 3)
    with pytest.raises(ConfigError, match="-1"):
        generate("train", -1)
    assert generate("train", 0) == []
