"""Tables about things that are bought."""

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

CARS = Table(
    "cars",
    "car",
    "cars",
    (
        Key(
            "model",
            "Astra X, Bolt, Comet, Drifter, Evora, Falcon, Gazelle, Hopper, Ion, Jaguaro, Kite, Lynx",
            noun="model",
        ),
        Category(
            "maker",
            "maker",
            "makers",
            "Volta, Zenith, Orion",
            before=("{}",),
            after=("made by {}", "from {}"),
            asks=("Who makes the {}?", "Which maker builds the {}?"),
        ),
        Category(
            "color",
            "color",
            "colors",
            "red, blue, black, white",
            before=("{}",),
            predicate="{}",
            asks=("What color is the {}?",),
        ),
        Measure("price", ("price", "cost"), Grid(9500, 64000, 500), "${}", DEAR, CHEAP, COSTS, additive=True),
        Measure(
            "horsepower",
            ("horsepower",),
            Grid(66, 410, 2),
            big=("powerful", "more powerful", "most powerful"),
            small=("weak", "less powerful", "least powerful"),
            asks=("What horsepower does the {} have?",),
        ),
        Tally("doors", "doors", Grid(2, 5)),
    ),
)

PHONES = Table(
    "phone",
    "phone",
    "phones",
    (
        Key(
            "model",
            "Pixie 3, Nova S, Argo, Luma 12, Echo Mini, Titan, Slate 5, Orbit, Zed Pro, Halo, Prism",
            noun="model",
        ),
        Category(
            "brand",
            "brand",
            "brands",
            "Tamsu, Nordik, Appel, Sonic",
            before=("{}",),
            after=("from {}", "made by {}"),
            asks=("Which brand makes the {}?", "What brand is the {}?"),
        ),
        Measure("price", ("price", "cost"), Grid(110, 1290, 10), "${}", DEAR, CHEAP, COSTS, additive=True),
        Measure(
            "battery",
            ("battery life",),
            Grid(8, 40),
            "{} hours",
            extremes=("longest", "shortest"),
            asks=("How many hours does the battery of the {} last?",),
        ),
        Tally("cameras", "cameras", Grid(1, 5)),
    ),
)

LAPTOPS = Table(
    "laptops",
    "laptop",
    "laptops",
    (
        Key(
            "model",
            "AirLite, BookOne, Corebook, Duo 14, Edge Pro, Flexa, Granite, Hyper 9, Inspire, Jetbook",
            noun="model",
        ),
        Category(
            "brand",
            "brand",
            "brands",
            "Delta, Asura, Fuji",
            before=("{}",),
            after=("from {}", "made by {}"),
            asks=("Which brand makes the {}?", "What brand is the {}?"),
        ),
        Measure(
            "memory",
            ("memory",),
            Grid(4, 64, 4),
            "{} GB",
            extremes=("largest", "smallest"),
            asks=("How much memory does the {} have?",),
        ),
        Measure("weight", ("weight",), Grid(0.9, 3.8, 0.1), "{} kg", HEAVY, LIGHT, WEIGHS),
        Measure("price", ("price", "cost"), Grid(390, 2900, 10), "${}", DEAR, CHEAP, COSTS, additive=True),
    ),
)

COFFEES = Table(
    "coffees",
    "coffee",
    "coffees",
    (
        Key(
            "blend",
            "Andino, Black Pearl, Choco Dawn, Dune, Earthsong, Fireside, Gayo Gold, Harrar, "
            "Imperial, Jolt, Kona Mist",
            noun="name",
        ),
        Category(
            "roast",
            "roast",
            "roasts",
            "light, medium, dark",
            before=("{} roast",),
            asks=("What roast is {}?",),
        ),
        Category(
            "origin",
            "origin",
            "origins",
            "Colombia, Uganda, Vietnam, Yemen",
            after=("from {}",),
            asks=("Where does {} come from?",),
        ),
        Measure("price", ("price", "cost"), Grid(6.5, 31, 0.5), "${}", DEAR, CHEAP, COSTS, additive=True),
        Tally("bags", "bags in stock", Grid(2, 95), asks=("How many bags of {} are in stock?",)),
    ),
)

SOFAS = Table(
    "sofa",
    "sofa",
    "sofas",
    (
        Key(
            "model",
            "Alto, Birch Nook, Cloud, Dune Rest, Eden, Fjordlie, Gran Relax, Hugga, Idyll, Juno, "
            "Kivik Home, Loft",
            noun="model",
        ),
        Category(
            "fabric",
            "fabric",
            "fabrics",
            "velvet, leather, linen",
            before=("{}",),
            after=("covered in {}",),
            asks=("Which fabric is the {} covered in?",),
        ),
        Category(
            "color",
            "color",
            "colors",
            "beige, teal, purple",
            before=("{}",),
            predicate="{}",
            asks=("What color is the {}?",),
        ),
        Tally("seats", "seats", Grid(2, 7)),
        Measure(
            "width",
            ("width",),
            Grid(140, 330, 5),
            "{} cm",
            ("wide", "wider", "widest"),
            ("narrow", "narrower", "narrowest"),
        ),
        Measure("price", ("price", "cost"), Grid(290, 2650, 10), "${}", DEAR, CHEAP, COSTS, additive=True),
    ),
)

TABLES = (CARS, PHONES, LAPTOPS, COFFEES, SOFAS)
