"""Tables about food, plants and animals."""

from __future__ import annotations

from lorakit.tasks.text_to_sql.schema import (
    Category,
    Grid,
    Key,
    Measure,
    Table,
    Tally,
    present,
)

COSTS = present("cost", "costs")
WEIGHS = present("weigh", "weighs")
DEAR = ("expensive", "more expensive", "most expensive")
CHEAP = ("cheap", "cheaper", "cheapest")
HEAVY = ("heavy", "heavier", "heaviest")
LIGHT = ("light", "lighter", "lightest")

RECIPES = Table(
    "recipes",
    "recipe",
    "recipes",
    (
        Key(
            "dish",
            "Lentil Soup, Apple Pie, Beef Stew, Fried Rice, Fish Tacos, Pea Curry, Onion Tart, "
            "Bean Salad, Corn Bread, Plum Cake, Egg Noodles, Nut Roast",
            noun="dish",
        ),
        Category(
            "cuisine",
            "cuisine",
            "cuisines",
            "Indian, Mexican, Italian, Thai",
            before=("{}",),
            asks=("Which cuisine does {} belong to?",),
        ),
        Tally("calories", "calories", Grid(120, 890, 10)),
        Measure(
            "minutes",
            ("cooking time",),
            Grid(10, 150, 5),
            "{} minutes",
            ("slow", "slower", "slowest"),
            ("quick", "quicker", "quickest"),
            present("take", "takes"),
            ("longest", "shortest"),
            True,
            asks=("How many minutes does {} take?",),
        ),
        Tally("servings", "servings", Grid(2, 12)),
    ),
)

ANIMALS = Table(
    "animals",
    "animal",
    "animals",
    (
        Key(
            "animal",
            "otter, badger, gazelle, python, tortoise, lynx, heron, walrus, gecko, wombat, ibex, macaw",
            noun="name",
        ),
        Category(
            "habitat",
            "habitat",
            "habitats",
            "forest, desert, swamp, mountains",
            after=("from the {}", "that live in the {}"),
            asks=("What is the habitat of the {}?",),
        ),
        Measure("weight", ("weight",), Grid(2, 240), "{} kg", HEAVY, LIGHT, WEIGHS),
        Measure(
            "lifespan",
            ("lifespan",),
            Grid(3, 85),
            "{} years",
            extremes=("longest", "shortest"),
            asks=("How many years does the {} live?",),
        ),
        Tally("young", "young", Grid(1, 12), asks=("How many young does the {} have?",)),
    ),
)

PLANTS = Table(
    "plants",
    "plant",
    "plants",
    (
        Key(
            "plant",
            "fern, orchid, lavender, cactus, ivy, peony, basil, aloe, begonia, jasmine, mint",
            noun="name",
        ),
        Category(
            "light",
            "light level",
            "light levels",
            "full sun, half shade, deep shade",
            after=("for {}", "that need {}"),
            asks=("How much light does {} need?",),
        ),
        Measure(
            "height",
            ("height",),
            Grid(10, 190, 5),
            "{} cm",
            ("tall", "taller", "tallest"),
            ("short", "shorter", "shortest"),
            extremes=("greatest", "lowest"),
        ),
        Measure("price", ("price",), Grid(2, 49), "${}", DEAR, CHEAP, COSTS, additive=True),
        Tally("stock", "pieces in stock", Grid(0, 80), asks=("How many pieces of {} are in stock?",)),
    ),
)

CHEESES = Table(
    "cheese",
    "cheese",
    "cheeses",
    (
        Key(
            "name",
            "Alvano, Bergtal, Corsu, Dorvik, Emberdam, Fontana, Gouverne, Halden, Islay Blue, Jurado",
            noun="name",
        ),
        Category(
            "milk",
            "kind of milk",
            "kinds of milk",
            "cow, goat, sheep",
            before=("{} milk",),
            after=("made from {} milk",),
            asks=("Which kind of milk is {} made from?",),
        ),
        Category(
            "origin",
            "origin",
            "origins",
            "Wales, Denmark, Greece",
            after=("from {}",),
            asks=("Where does {} come from?",),
        ),
        Measure("fat", ("fat content",), Grid(12, 58), "{} percent"),
        Measure(
            "months",
            ("aging time",),
            Grid(1, 36),
            "{} months",
            extremes=("longest", "shortest"),
            asks=("How many months is {} aged?",),
        ),
    ),
)

DOGS = Table(
    "dogs",
    "dog",
    "dogs",
    (
        Key("name", "Rex, Bella, Fido, Luna, Bruno, Daisy, Oscar, Molly, Ziggy, Pepper, Waldo, Coco"),
        Category(
            "breed",
            "breed",
            "breeds",
            "poodle, beagle, collie, boxer",
            after=("of the breed {}",),
            asks=("What breed is {}?", "Which breed is {}?"),
        ),
        Measure(
            "age",
            ("age",),
            Grid(1, 15),
            "{} years",
            ("old", "older", "oldest"),
            ("young", "younger", "youngest"),
        ),
        Measure("weight", ("weight",), Grid(5, 48), "{} kg", HEAVY, LIGHT, WEIGHS, additive=True),
        Tally("prizes", "prizes", Grid(0, 9)),
    ),
)

TABLES = (RECIPES, ANIMALS, PLANTS, CHEESES, DOGS)
