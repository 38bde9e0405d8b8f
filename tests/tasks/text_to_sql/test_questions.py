"""Questions say everything that the query needs, in clean and varied English."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from lorakit.tasks.text_to_sql import KINDS, generate
from lorakit.tasks.text_to_sql.phrases import _COUNTS

EXAMPLES = [*generate("train", 1500), *generate("valid", 300), *generate("test", 300)]


def spoken(condition):
    """The value of a condition as a question shows it."""
    return str(condition.value).strip("%")


def test_a_question_names_every_value_in_the_order_of_the_query():
    for example in EXAMPLES:
        position = 0
        for condition in example.query.where:
            # A number must stand alone: 12 is not named by 125 or by 12.5.
            found = re.search(
                rf"(?<![\d.]){re.escape(spoken(condition))}(?!\d|\.\d)", example.question[position:]
            )
            assert found, (example.question, example.sql)
            position += found.end()


def test_a_question_names_its_limit():
    for example in EXAMPLES:
        limit = example.query.limit
        if limit and limit > 1:
            assert re.search(rf"\b({limit}|{_COUNTS[limit]})\b", example.question), (
                example.question,
                example.sql,
            )


def test_a_question_never_quotes_sql():
    for example in EXAMPLES:
        assert not re.search(r"SELECT|COUNT|WHERE|ORDER BY|LIMIT|_|%", example.question), example.question


def test_the_text_is_clean():
    for example in EXAMPLES:
        question = example.question
        assert question == question.strip()
        assert not re.search(
            r"\s\s|\{|\}|\bthe the\b|\ba [aeiou]|\ban [^aeiou\d]|\s[,.?]|\?.+|None", question
        ), question
        assert (
            question[-1] in "?."
            or question[0].islower()
            or example.kind in ("lookup", "filter", "superlative", "top")
        )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_many_shapes(kind):
    openings = defaultdict(int)
    for example in EXAMPLES:
        if example.kind == kind:
            openings[" ".join(example.question.split()[:2])] += 1
    assert len(openings) >= (5 if kind == "having" else 10)


def test_questions_come_as_question_as_request_and_as_note():
    shares = [sum(example.question.endswith(mark) for example in EXAMPLES) / len(EXAMPLES) for mark in "?."]
    assert shares[0] > 0.3
    assert shares[1] > 0.2
    assert 1 - sum(shares) > 0.08


def test_people_are_asked_for_with_who():
    asked = [example.question for example in EXAMPLES if example.table.person and example.kind != "having"]
    assert any(question.startswith("Who ") for question in asked)
    assert not any(
        re.search(r"\bthat (has|have|is|are|was|were|scored|won|joined)\b", question) for question in asked
    )
