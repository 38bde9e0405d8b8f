"""The built-in text-to-SQL task: questions about one small table, answered by one SQL query.

A generator makes the questions: it draws a table, draws a query plan over it, checks by running it on SQLite
that the answer says something, and puts the plan into one of many English wordings. Train, valid and test ask
about different tables, so a model is measured on columns and values that it never saw. Everything follows
from the seed.

    from lorakit.tasks import text_to_sql

    train = text_to_sql.generate("train", 1000)
    text_to_sql.messages(train[0])      # the prompt, as chat messages
    text_to_sql.answer(train[0])        # the gold SQL
    text_to_sql.evaluate(answers, test) # execution accuracy of raw model answers
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.tasks.execution import ExecutionReport, execution_accuracy

from .examples import Example, generate
from .plans import KINDS, Kind
from .prompt import answer, extract_sql, messages, prompt
from .query import Query
from .schema import Table
from .tables import SPLITS, Split, tables

__all__ = [
    "Example",
    "Kind",
    "KINDS",
    "Query",
    "Split",
    "SPLITS",
    "Table",
    "answer",
    "evaluate",
    "extract_sql",
    "generate",
    "messages",
    "prompt",
    "tables",
]


def evaluate(answers: Sequence[str], examples: Sequence[Example]) -> ExecutionReport:
    """Execution accuracy of a model's raw answers, one for each example.

    Raises:
        ConfigError: the numbers of answers and examples differ, or there are none.
    """
    return execution_accuracy(
        [extract_sql(text) for text in answers], [example.case() for example in examples]
    )
