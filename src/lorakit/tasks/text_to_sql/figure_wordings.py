"""Wordings of questions that are answered by figures: how many, the average, for each, the most common."""

from __future__ import annotations

from .asked import Asked
from .phrases import column_noun, count_word
from .query import ROW_COUNT
from .schema import Category, Measure, Tally, Year


def count(asked: Asked) -> list[str]:
    """How many rows."""
    dice, rows = asked.dice, asked.rows()
    options = [
        f"How many {rows} are there?",
        f"How many {rows} {dice.choice(('are in the table', 'are listed', 'do we have'))}?",
        f"What is the number of {rows}?",
        f"Count the {rows}.",
        f"{asked.show(many=False)} the number of {rows}.",
        f"number of {rows}",
    ]
    told = asked.subject_and_predicate()
    if told:
        options += [f"How many {told[0]} {told[1]}?"] * 4
        options.append(f"Count how many {told[0]} {told[1]}.")
    return options


def _aggregate_phrases(asked: Asked, function: str, column_name: str) -> list[str]:
    """What an aggregate of a column is called: "average price", "total number of goals"."""
    column, dice = asked.table.column(column_name), asked.dice
    noun = column_noun(column, dice)
    if function == "AVG":
        return [f"average {noun}", f"mean {noun}"]
    if function == "SUM":
        return [
            f"total {noun}",
            f"combined {noun}",
            f"sum of the {noun}" if isinstance(column, Measure) else f"total {noun}",
        ]
    high = function == "MAX"
    if isinstance(column, Year):
        return [f"{'latest' if high else 'earliest'} {noun}"]
    words = ["maximum" if high else "minimum"]
    words += (
        [column.extremes[0 if high else 1]]
        if isinstance(column, Measure)
        else ["highest" if high else "lowest"]
    )
    return [f"{adjective} {noun}" for adjective in words]


def _do(column: Tally) -> str:
    """The auxiliary of a column's verb for many rows: "do" or "did"."""
    return column.verb.auxiliary.replace("does", "do")


def aggregate(asked: Asked) -> list[str]:
    """One figure over a column."""
    table, dice, term = asked.table, asked.dice, asked.query.select[0]
    column = table.column(term.column)
    what = dice.choice(_aggregate_phrases(asked, term.aggregate, term.column))
    rows = asked.rows()
    all_rows = dice.choice(("all ", "the ", "")) + rows
    preposition = "of" if term.aggregate in ("AVG", "SUM") else dice.choice(("of", "among"))
    options = [
        f"What is the {what} {preposition} {all_rows}?",
        f"{asked.show(many=False)} the {what} {preposition} {all_rows}.",
        f"{what} of {rows}",
        f"{dice.choice(('Compute', 'Calculate', 'Determine'))} the {what} of {all_rows}.",
        f"I want to know the {what} of {all_rows}.",
    ]
    if isinstance(column, Tally) and term.aggregate == "SUM":
        together = dice.choice(("in total", "altogether", "together"))
        options += [f"How many {column.things} {_do(column)} {all_rows} {column.verb.base} {together}?"] * 3
    if isinstance(column, Tally) and term.aggregate == "AVG":
        options.append(f"How many {column.things} {_do(column)} {all_rows} {column.verb.base} on average?")
    if isinstance(column, Measure) and column.big and term.aggregate == "AVG":
        options.append(f"How {column.big[0]} are {all_rows} on average?")
    return options


def distinct(asked: Asked) -> list[str]:
    """The different values of a category, or how many there are."""
    dice, term = asked.dice, asked.query.select[0]
    column = asked.table.column(term.column)
    assert isinstance(column, Category)
    rows = dice.choice(("all ", "the ", "")) + asked.rows() if asked.phrases else f"the {asked.table.plural}"
    different = dice.choice(("different", "distinct", "unique"))
    if term.aggregate:
        return [
            f"How many {different} {column.plural} are there among {rows}?",
            f"How many {different} {column.plural} do {rows} have?",
            f"Count the {different} {column.plural} of {rows}.",
            f"What is the number of {different} {column.plural} of {rows}?",
            f"number of {different} {column.plural} of {rows}",
        ]
    return [
        f"What are the {different} {column.plural} of {rows}?",
        f"Which {different} {column.plural} are there among {rows}?",
        f"{asked.show()} the {different} {column.plural} of {rows}.",
        f"List each {column.noun} of {rows} only once.",
        f"{different} {column.plural} of {rows}",
    ]


def group(asked: Asked) -> list[str]:
    """A figure for every value of a category."""
    table, dice, query = asked.table, asked.dice, asked.query
    category = table.column(query.group_by)
    assert isinstance(category, Category)
    group, value = category.noun, query.select[1]
    each = dice.choice((f"for each {group}", f"per {group}", f"for every {group}"))
    if value == ROW_COUNT:
        return [
            f"How many {table.plural} are there {each}?",
            f"For each {group}, how many {table.plural} are there?",
            f"{asked.show()} the number of {table.plural} {each}.",
            f"Count the {table.plural} {each}.",
            f"{asked.show()} every {group} and its number of {table.plural}.",
            f"number of {table.plural} by {group}",
        ]
    what = dice.choice(_aggregate_phrases(asked, value.aggregate, value.column))
    return [
        f"What is the {what} of the {table.plural} {each}?",
        f"{asked.show()} the {what} of the {table.plural} {each}.",
        f"For each {group}, what is the {what} of the {table.plural}?",
        f"{asked.show()} every {group} and the {what} of its {table.plural}.",
        f"{what} of {table.plural} by {group}",
    ]


def having(asked: Asked) -> list[str]:
    """The values of a category that have a number of rows."""
    table, dice, having = asked.table, asked.dice, asked.query.having
    category = table.column(asked.query.group_by)
    assert isinstance(category, Category)
    assert having
    assert isinstance(having.value, int)
    many = count_word(having.value, dice)
    wordings = {
        ">": (f"more than {many}",),
        ">=": (f"at least {many}", f"{many} or more"),
        "<": (f"fewer than {many}", f"less than {many}"),
        "=": (f"exactly {many}",),
    }
    amount = f"{dice.choice(wordings[having.operator])} {table.plural}"
    return [
        f"Which {category.plural} have {amount}?",
        f"{asked.show()} the {category.plural} that have {amount}.",
        f"{asked.show()} the {category.plural} with {amount}.",
        f"What are the {category.plural} with {amount}?",
        f"{category.plural} with {amount}",
    ]


def commonest(asked: Asked) -> list[str]:
    """The value of a category with the most or the fewest rows."""
    table, query = asked.table, asked.query
    category = table.column(query.group_by)
    assert isinstance(category, Category)
    assert query.order_by
    rows = asked.rows()
    common, most = ("most common", "most") if query.order_by.descending else ("least common", "fewest")
    return [
        f"What is the {common} {category.noun} of {'the ' if not asked.phrases else ''}{rows}?",
        f"Which {category.noun} has the {most} {rows}?",
        f"{asked.show(many=False)} the {category.noun} with the {most} {rows}.",
        f"What is the {category.noun} with the {most} {rows}?",
        f"{category.noun} with the {most} {rows}",
    ]
