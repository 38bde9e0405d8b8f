"""Wordings of questions that are answered by rows: which, show, the tallest, sorted by."""

from __future__ import annotations

from .asked import Asked
from .phrases import column_noun, count_word, extreme, listed
from .schema import Key, Measure, Tally, Year


def lookup(asked: Asked) -> list[str]:
    """A column or two of one named row."""
    table, dice = asked.table, asked.dice
    name = str(asked.query.where[0].value)
    nouns = asked.nouns()
    what, called = listed(nouns), name
    if dice.chance(0.25):
        called = f"the {table.singular} {dice.choice(('called ', 'named ', ''))}{name}"
    be = "are" if len(nouns) > 1 else "is"
    options = [
        f"What {be} the {what} of {called}?",
        f"{asked.show(many=False)} the {what} of {called}.",
        f"{what} of {name}",
        f"What {be} {name}'s {what}?" if table.person else f"{name}: {what}?",
        f"For {called}, what {be} the {' and the '.join(nouns)}?",
        f"I need the {what} of {called}.",
    ]
    if len(nouns) == 1:
        options += _asks(asked, name) * 3
    return options


def _asks(asked: Asked, name: str) -> list[str]:
    """Direct questions for one column of one row: "How tall is X?"."""
    column = asked.table.column(asked.query.select[0].column)
    if isinstance(column, Key):
        return []
    if isinstance(column, Year):
        if column.verb:
            return [f"When did {name} {column.verb.base}?", f"In which year did {name} {column.verb.base}?"]
        return [f"When was {name} {column.participle}?", f"In which year was {name} {column.participle}?"]
    options = [question.format(name) for question in column.asks]
    if isinstance(column, Tally) and not options:
        options += [f"How many {column.things} {column.verb.auxiliary} {name} {column.verb.base}?"]
    if isinstance(column, Measure):
        if column.verb and not column.asks:
            options += [f"How much {column.verb.auxiliary} {name} {column.verb.base}?"]
        if column.big and not column.asks:
            options += [f"How {column.big[0]} is {name}?"]
    return options


def filter(asked: Asked) -> list[str]:
    """The rows that meet conditions."""
    table, dice = asked.table, asked.dice
    rows, each = asked.rows(), asked.rows(many=False)
    key, show = table.key.noun, asked.show()
    options = [
        f"What are the {key}s of {dice.choice(('all ', 'the ', ''))}{rows}?",
        f"Which {rows} are there?",
        f"{show} the {key}s of {dice.choice(('all ', 'the ', ''))}{rows}.",
        f"{show} {dice.choice(('all ', 'the ', ''))}{rows}.",
        f"Name {dice.choice(('all ', 'the ', ''))}{rows}.",
        f"{show} the {key} of {dice.choice(('each', 'every'))} {each}.",
        f"{dice.choice(('all ', '', f'{key}s of '))}{rows}",
    ]
    if table.person:
        options.append(f"Who are the {rows}?")
    told = asked.subject_and_predicate()
    if told:
        options += [f"{dice.choice(('Which', 'What'))} {told[0]} {told[1]}?"] * 4
    return options


def project(asked: Asked) -> list[str]:
    """Columns of the rows that meet conditions."""
    dice, nouns = asked.dice, asked.nouns()
    what, show = listed(nouns), asked.show()
    rows, each = asked.rows(), asked.rows(many=False)
    every = dice.choice(("each", "every"))
    be = "are" if len(nouns) > 1 else "is"
    return [
        f"What {be} the {what} of {every} {each}?",
        f"{show} the {what} of {dice.choice(('all ', ''))}{rows}.",
        f"{show} the {what} of {every} {each}.",
        f"{show} the {what} for {dice.choice(('all ', ''))}{rows}.",
        f"For {every} {each}, {dice.choice(('show', 'give', 'list'))} the {what}.",
        f"{what} of {dice.choice(('all ', ''))}{rows}",
    ]


def superlative(asked: Asked) -> list[str]:
    """The one row at an end of a column, or something about it."""
    table, dice, query = asked.table, asked.dice, asked.query
    assert query.order_by
    column = table.column(query.order_by.term.column)
    assert isinstance(column, Measure | Tally | Year)
    end = extreme(table, column, query.order_by.descending, dice)
    # "with 3 parks with the most dams" does not read well: then only the forms that keep the two apart.
    crowded = any(phrase.place not in ("before", "after") for phrase in asked.phrases)
    each = asked.rows(many=False)
    pointed = [] if crowded else [asked.rows(many=False, ending=end.ending)]
    if end.adjective:
        pointed += [asked.rows(many=False, superlative=end.adjective)] * 2
    if not pointed:
        pointed = [f"{each} {'who' if table.person else 'that'} {end.clause}"]
    row, show = dice.choice(pointed), asked.show(many=False)
    if [term.column for term in query.select] == [table.key.name]:
        options = [
            f"{'Who' if table.person else 'What'} is the {row}?",
            f"{show} the {row}.",
            f"{show} the {table.key.noun} of the {row}.",
            f"What is the {table.key.noun} of the {row}?",
            f"Name the {row}.",
            row,
            f"Which {each} {end.clause}?",
            f"Which {each} {end.clause}?",
        ]
        if end.adjective:
            options.append(f"Which {each} is the {end.adjective}?")
        if table.person and not asked.phrases:
            options.append(f"Who {end.clause}?")
        return options
    nouns = asked.nouns()
    what, be = listed(nouns), "are" if len(nouns) > 1 else "is"
    return [
        f"What {be} the {what} of the {row}?",
        f"{show} the {what} of the {row}.",
        f"{what} of the {row}",
        f"For the {row}, what {be} the {' and the '.join(nouns)}?",
    ]


def top(asked: Asked) -> list[str]:
    """The few rows at an end of a column."""
    table, dice, query = asked.table, asked.dice, asked.query
    assert query.order_by
    assert query.limit
    column = table.column(query.order_by.term.column)
    assert isinstance(column, Measure | Tally | Year)
    end = extreme(table, column, query.order_by.descending, dice)
    count = count_word(query.limit, dice)
    crowded = any(phrase.place not in ("before", "after") for phrase in asked.phrases)
    rows, noun = asked.rows(), column_noun(column, dice)
    ending = end.clause_many if isinstance(column, Year) and column.verb else end.ending
    if isinstance(column, Year) and column.verb:
        ending = f"{'who' if table.person else 'that'} {ending}"
    pointed = [] if crowded else [f"{count} {asked.rows(ending=ending)}"]
    if end.adjective:
        pointed += [f"{count} {end.adjective} {rows}"] * 2
    if query.order_by.descending and not isinstance(column, Year):
        pointed += [f"top {count} {rows} by {noun}"]
    if not pointed:
        pointed = [f"{count} {rows} {'who' if table.person else 'that'} {end.clause_many}"]
    group, show, key = dice.choice(pointed), asked.show(), table.key.noun
    if len(query.select) == 2:
        what = f"{key} and {noun}"
        return [
            f"{show} the {what} of the {group}.",
            f"What are the {what} of the {group}?",
            f"{what} of the {group}",
        ]
    return [
        f"{'Who' if table.person else 'What'} are the {group}?",
        f"{show} the {group}.",
        f"{show} the {key}s of the {group}.",
        f"What are the {key}s of the {group}?",
        f"Name the {group}.",
        group,
        f"Which {count} {rows} {end.clause_many}?",
    ]


def sort(asked: Asked) -> list[str]:
    """All rows in an order."""
    table, dice, query = asked.table, asked.dice, asked.query
    assert query.order_by
    column, descending = table.column(query.order_by.term.column), query.order_by.descending
    noun = column_noun(column, dice)
    if isinstance(column, Key):
        orders = ["in alphabetical order", "sorted alphabetically", f"sorted by {column.noun}"]
    else:
        direction = "descending" if descending else "ascending"
        first, last = ("highest", "lowest") if descending else ("lowest", "highest")
        if isinstance(column, Year):
            first, last = ("latest", "earliest") if descending else ("earliest", "latest")
        orders = [
            f"in {direction} order of {noun}",
            f"sorted by {noun} in {direction} order",
            f"ordered by {noun}, {first} first",
            f"sorted by {noun} from {first} to {last}",
        ]
        ends = [extreme(table, column, side, dice).adjective for side in (descending, not descending)] \
            if isinstance(column, Measure | Tally | Year) else []  # fmt: skip
        if all(ends) and ends:
            orders += [f"from {ends[0]} to {ends[1]}", f"{ends[0]} first"]
    order, rows, show = dice.choice(orders), asked.rows(), asked.show()
    every = dice.choice(("all ", "the ")) if asked.phrases else dice.choice(("all ", "all the ", "the "))
    what = listed([table.key.noun, *([noun] if len(query.select) == 2 else [])])
    if len(query.select) == 2:
        return [f"{show} the {what} of {every}{rows}, {order}.", f"{what} of {every}{rows}, {order}"]
    return [
        f"{show} {every}{rows} {order}.",
        f"{show} {every}{rows}, {order}.",
        f"{show} the {table.key.noun}s of {every}{rows} {order}.",
        f"{every}{rows} {order}",
        f"What are the {table.key.noun}s of {every}{rows}, {order}?",
    ]
