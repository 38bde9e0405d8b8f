"""The pieces of sentences are put together in good English."""

from __future__ import annotations

import pytest

from lorakit.tasks.text_to_sql.dice import Dice
from lorakit.tasks.text_to_sql.phrases import (
    Phrase,
    article,
    column_noun,
    condition_phrases,
    count_word,
    extreme,
    in_order,
    listed,
    rows_phrase,
)
from lorakit.tasks.text_to_sql.query import Condition, Term
from lorakit.tasks.text_to_sql.schema import Category, Grid, Key, Measure, Table, Tally, Year, past, present

KEY = Key("name", "Ann, Bob")
COLOR = Category("color", "color", "colors", "red, blue", before=("{}",), predicate="{}")
PRICE = Measure(
    "price",
    ("price",),
    Grid(1, 9),
    "${}",
    ("dear", "dearer", "dearest"),
    ("", "cheaper", "cheapest"),
    present("cost", "costs"),
)
DOORS = Tally("doors", "doors", Grid(2, 5))
GOALS = Tally("goals", "goals", Grid(2, 5), past("score", "scored"))
BUILT = Year("built", ("building year",), Grid(1900, 2000), "built", "newest", "oldest")
JOINED = Year("joined", ("joining year",), Grid(1900, 2000), verb=past("join", "joined"))
CARS = Table("cars", "car", "cars", (KEY, COLOR, PRICE, DOORS, BUILT))
PLAYERS = Table("players", "player", "players", (KEY, GOALS, JOINED), person=True)


def said(column, operator, value):
    """Everything that can be said of a condition, as (place, text)."""
    condition = Condition(Term(column.name), operator, value)
    return {
        (phrase.place, phrase.text)
        for seed in range(60)
        for phrase in condition_phrases(column, condition, Dice(seed))
    }


def test_categories():
    assert said(COLOR, "=", "red") == {("before", "red"), ("whose", "color is red")}


def test_measures():
    texts = said(PRICE, ">", 5)
    assert {("after", "dearer than $5"), ("with", "a price above 5"), ("that", "cost more than $5")} <= texts
    assert ("after", "cheaper than $5") in said(PRICE, "<", 5)
    assert all("than" not in text for _, text in said(PRICE, "=", 5))


def test_tallies_and_years():
    assert {("with", "at least 4 doors"), ("that", "have 4 or more doors")} <= said(DOORS, ">=", 4)
    assert ("that", "scored fewer than 3 goals") in said(GOALS, "<", 3)
    assert said(BUILT, ">=", 1950) == {("after", "built in 1950 or later"), ("after", "built since 1950")}
    assert ("that", "joined before 1950") in said(JOINED, "<", 1950)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("S%", "name starts with S"), ("%s", "name ends with s"), ("%ann%", 'name contains "ann"')],
)
def test_text_patterns(pattern, text):
    assert ("whose", text) in said(KEY, "LIKE", pattern)


def test_opposite_operators_are_never_said_alike():
    for column in (PRICE, DOORS, GOALS, BUILT, JOINED):
        spoken = [said(column, operator, 5) for operator in (">", "<", ">=", "<=", "=")]
        assert sum(map(len, spoken)) == len(set().union(*spoken))


RED, PERU = Phrase("before", "red", "red"), Phrase("after", "in Peru", "in Peru")
CHEAP, FOUR = Phrase("with", "a price of 5", "a price of 5"), Phrase("with", "4 doors", "4 doors")
WHOSE, ALSO = Phrase("whose", "price is 5", "price is 5"), Phrase("whose", "age is 3", "age is 3")
COST, WEIGH = Phrase("that", "cost 5", "costs 5"), Phrase("that", "weigh 3", "weighs 3")


@pytest.mark.parametrize(
    ("phrases", "many", "text"),
    [
        ((), True, "cars"),
        ((RED, PERU), True, "red cars in Peru"),
        ((PERU, CHEAP), False, "car in Peru with a price of 5"),
        ((CHEAP, FOUR), True, "cars with a price of 5 and 4 doors"),
        ((WHOSE, ALSO), True, "cars whose price is 5 and whose age is 3"),
        ((CHEAP, WHOSE), True, "cars with a price of 5 whose price is 5"),
        ((COST, WEIGH), True, "cars that cost 5 and weigh 3"),
        ((COST, WEIGH), False, "car that costs 5 and weighs 3"),
    ],
)
def test_groups_of_rows(phrases, many, text):
    assert rows_phrase(CARS, phrases, many=many) == text


def test_people_are_who():
    assert rows_phrase(PLAYERS, (COST,), many=True) == "players who cost 5"


def test_superlative_and_ending():
    text = rows_phrase(CARS, (RED,), many=False, superlative="newest", ending="with the most doors")
    assert text == "newest red car with the most doors"


def test_conditions_come_in_the_order_of_their_places():
    conditions = [Condition(Term(name), "=", 1) for name in "abc"]
    ordered = in_order(list(zip(conditions, (COST, RED, CHEAP), strict=True)))
    assert [phrase for _, phrase in ordered] == [RED, CHEAP, COST]
    assert [condition.term.column for condition, _ in ordered] == ["b", "c", "a"]


def test_extremes():
    dice = Dice("extremes")
    assert extreme(CARS, PRICE, True, dice).adjective == "dearest"
    assert extreme(CARS, PRICE, False, dice).ending == "with the lowest price"
    assert extreme(CARS, DOORS, False, dice).clause == "has the fewest doors"
    assert extreme(PLAYERS, GOALS, True, dice).clause == "scored the most goals"
    assert extreme(CARS, BUILT, False, dice).adjective == "oldest"
    assert extreme(PLAYERS, JOINED, True, dice).ending in ("who joined last", "who joined most recently")


def test_small_words():
    assert [article("area"), article("price")] == ["an area", "a price"]
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert {count_word(3, Dice(seed)) for seed in range(20)} == {"3", "three"}
    assert count_word(12, Dice(0)) == "12"
    assert column_noun(GOALS, Dice(0)) == "number of goals"
