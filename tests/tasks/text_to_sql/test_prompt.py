"""The prompt is compact and complete; SQL is taken out of whatever a model says."""

from __future__ import annotations

import statistics

import pytest

from lorakit.tasks.text_to_sql import answer, evaluate, extract_sql, generate, messages

EXAMPLES = generate("train", 300)
SQL = "SELECT name FROM dogs WHERE age > 3"


def test_one_user_message_with_the_schema_and_the_question():
    for example in EXAMPLES:
        (message,) = messages(example)
        assert message["role"] == "user"
        assert example.table.schema() in message["content"]
        assert message["content"].endswith(example.question)
        assert example.sql not in message["content"]


def test_the_answer_is_one_canonical_line():
    for example in EXAMPLES:
        assert answer(example) == example.sql
        assert "\n" not in answer(example)
        assert not answer(example).endswith(";")


def test_prompts_are_short():
    # The 75 tokens aimed at are some 250 characters of this text (about 3.5 characters a token).
    lengths = [len(messages(example)[0]["content"]) + len(answer(example)) for example in EXAMPLES]
    assert statistics.median(lengths) < 250


def test_an_answer_survives_extraction():
    for example in EXAMPLES:
        assert extract_sql(answer(example)) == example.sql
        assert extract_sql(f"Here it is:\n```sql\n{example.sql};\n```\nThis query works.") == example.sql


@pytest.mark.parametrize(
    "text",
    [
        SQL,
        f"{SQL};",
        f"  {SQL} ;  \n",
        f"SQL: {SQL}",
        f"SQLite query: {SQL};",
        f"```sql\n{SQL};\n```",
        f"```\n{SQL}\n```",
        f"```SQLite\n{SQL}\n```\n\nThis returns the dogs that are older than 3; it's easy.",
        f"```sql\n{SQL}",
        f"Sure! Here's a query with what you need:\n\n```sql\n{SQL};\n```",
        f"The query `{SQL}` gives the answer.",
        f"You can use a SELECT statement: {SQL};",
        f"{SQL}\n\nThis query selects the name of dogs.",
        f"{SQL}\nThis query selects the name of dogs.",
        f"{SQL}\nExplanation: older than 3",
        f"{SQL}; SELECT 2;",
        "SELECT name\n  FROM dogs\n  WHERE age > 3;",
        "```python\nprint(1)\n```\n```sql\nSELECT name FROM dogs WHERE age > 3\n```",
        f"{SQL}<|im_end|>",
    ],
)
def test_format_is_forgiven(text):
    assert extract_sql(text) == SQL


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("select Name from dogs", "select Name from dogs"),
        ("SELECT name FROM dogs WHERE note = 'a;  b'; and", "SELECT name FROM dogs WHERE note = 'a;  b'"),
        ("SELECT name FROM dogs WHERE name = 'O''Dell;'", "SELECT name FROM dogs WHERE name = 'O''Dell;'"),
        ('SELECT name FROM dogs WHERE name = "x;y";', 'SELECT name FROM dogs WHERE name = "x;y"'),
        ("SELECT `name` FROM dogs", "SELECT `name` FROM dogs"),
        ("WITH d AS (SELECT 1) SELECT * FROM d;", "WITH d AS (SELECT 1) SELECT * FROM d"),
        ("With pleasure: SELECT 1", "SELECT 1"),
        (
            "SELECT name FROM dogs WHERE id IN (SELECT id FROM d)",
            "SELECT name FROM dogs WHERE id IN (SELECT id FROM d)",
        ),
    ],
)
def test_the_query_itself_is_left_alone(text, sql):
    assert extract_sql(text) == sql


@pytest.mark.parametrize("text", ["", "  \n ", "There are 3 dogs.", "DELETE FROM dogs"])
def test_what_holds_no_query_is_returned_trimmed(text):
    assert extract_sql(text) == text.strip()


def test_evaluate_judges_raw_answers():
    examples = EXAMPLES[:4]
    fenced = [f"```sql\n{answer(example)};\n```" for example in examples]
    assert evaluate(fenced, examples).accuracy == 1
    report = evaluate([*fenced[:2], "I do not know.", "SELECT 1"], examples)
    assert [verdict.correct for verdict in report.verdicts] == [True, True, False, False]
    assert report.failed == 1
