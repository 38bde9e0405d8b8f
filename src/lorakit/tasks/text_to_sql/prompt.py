"""Examples as chat messages, and SQL out of a model's raw answer."""

from __future__ import annotations

import re

from .examples import Example

_FENCE = re.compile(r"```[ \t]*[a-zA-Z]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_START = re.compile(
    r"\bSELECT\b(?!\s+(?:statement|query|clause|command|keyword)\b)"
    r"|\bWITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^)]*\))?\s*AS\s*\(",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")
# A query ends at a semicolon, an empty line, a code fence, or a line that is plainly prose or a new label.
_END = re.compile(
    r";|\n[ \t]*\n|```|<\||\n\s*(?:this|the|note|explanation|question|answer|output|result|sql|here|in)\b",
    re.IGNORECASE,
)


def prompt(schema: str, question: str) -> str:
    """The text of the user's message: the table, what to do, the question.

    The wording is short, for the prompt's tokens are the cost of training on a CPU, yet says enough that an
    instruct model that was never tuned for the task knows what is asked.
    """
    return f"SQL table: {schema}\nWrite one SELECT query.\nQuestion: {question}"


def messages(example: Example) -> list[dict[str, str]]:
    """The conversation that the model is to continue: one user message."""
    return [{"role": "user", "content": prompt(example.table.schema(), example.question)}]


def answer(example: Example) -> str:
    """The target: the gold SQL on one line."""
    return example.sql


def extract_sql(text: str) -> str:
    """The first query in a model's answer, on one line.

    A model that was not trained for this format must not lose points for it: code fences, labels and
        sentences around the query are taken off, as is everything after it. The query itself is left as it
        was written.

    Args:
        text: the answer as generated.

    Returns:
        The query without its closing semicolon; the trimmed text when it holds nothing that looks like a
        query.
    """
    for block in _FENCE.findall(text):
        if _START.search(block):
            text = block
            break
    start = _START.search(text)
    if not start:
        return " ".join(text.split())
    body = text[start.start() :]
    if text[: start.start()].endswith("`"):
        body = body.split("`", 1)[0]
    return _one_line(body[: _end(body)])


def _end(body: str) -> int:
    """Where the query ends; marks inside quotes do not count."""
    masked = _QUOTED.sub(lambda match: "x" * len(match.group()), body)
    end = _END.search(masked)
    return end.start() if end else len(body)


def _one_line(sql: str) -> str:
    """The SQL with every run of white space outside quotes made one space."""
    parts, position = [], 0
    for quoted in _QUOTED.finditer(sql):
        parts += [re.sub(r"\s+", " ", sql[position : quoted.start()]), quoted.group()]
        position = quoted.end()
    return "".join([*parts, re.sub(r"\s+", " ", sql[position:])]).strip()
