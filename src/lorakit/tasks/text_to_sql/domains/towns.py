"""Tables about towns and buildings."""

from __future__ import annotations

from lorakit.tasks.text_to_sql.schema import (
    Category,
    Grid,
    Key,
    Measure,
    Table,
    Tally,
    Year,
    past,
    present,
)

CITIES = Table(
    "cities",
    "city",
    "cities",
    (
        Key(
            "name",
            "Marlow, Estrava, Kelding, Port Amal, Tiruna, Ostby, Valdora, Northam, Quilla, Senbara, "
            "Ruvik, Lantosa",
        ),
        Category(
            "country",
            "country",
            "countries",
            "Peru, Norway, Kenya, Japan",
            after=("in {}", "located in {}"),
            asks=("Which country is {} in?", "In which country is {}?"),
        ),
        Measure(
            "population",
            ("population",),
            Grid(12000, 98000, 1000),
            "{} people",
            big=("large", "larger", "largest"),
            small=("small", "smaller", "smallest"),
            additive=True,
            asks=("How many people live in {}?",),
        ),
        Year(
            "founded", ("founding year",), Grid(1120, 1890, 10), "founded", latest="newest", earliest="oldest"
        ),
        Tally("parks", "parks", Grid(2, 30)),
    ),
)

BRIDGES = Table(
    "bridge",
    "bridge",
    "bridges",
    (
        Key(
            "name",
            "Old Gate, Silver Arch, Queen Maud, Ferry Cross, Tanner Bridge, High Span, Stonebow, "
            "Millway, Harbor Link, Eagle Pass, Iron Maid",
        ),
        Category(
            "material",
            "material",
            "materials",
            "steel, stone, concrete",
            before=("{}",),
            after=("made of {}", "built of {}"),
            asks=("What is the {} made of?", "What material is the {} made of?"),
        ),
        Measure(
            "length",
            ("length",),
            Grid(60, 1900, 20),
            "{} meters",
            big=("long", "longer", "longest"),
            small=("short", "shorter", "shortest"),
            extremes=("greatest", "smallest"),
            additive=True,
        ),
        Tally("lanes", "lanes", Grid(2, 8)),
        Year("opened", ("opening year",), Grid(1860, 2019), "opened", latest="newest", earliest="oldest"),
    ),
)

HOTELS = Table(
    "hotels",
    "hotel",
    "hotels",
    (
        Key(
            "name",
            "Grand Palm, Blue Anchor, Hilltop Inn, Rosewood, The Lantern, Park View, Casa Luna, "
            "Northern Star, Velvet Room, Old Mill, Bay Lodge, Golden Key",
        ),
        Category(
            "city",
            "city",
            "cities",
            "Lisbon, Vienna, Boston, Osaka",
            after=("in {}", "located in {}"),
            asks=("Which city is {} in?", "In which city is {}?"),
        ),
        Tally("rooms", "rooms", Grid(14, 320, 2)),
        Measure(
            "price",
            ("price", "room price"),
            Grid(45, 390, 5),
            "${}",
            big=("expensive", "more expensive", "most expensive"),
            small=("cheap", "cheaper", "cheapest"),
            verb=present("cost", "costs"),
            asks=("How much does a room at {} cost?",),
        ),
        Measure("rating", ("rating", "guest rating"), Grid(2.5, 4.9, 0.1), extremes=("highest", "lowest")),
    ),
)

MUSEUMS = Table(
    "museums",
    "museum",
    "museums",
    (
        Key(
            "museum",
            "Clock House, Maritime Hall, Modern Wing, Toy Palace, Dinosaur Barn, Glass Gallery, "
            "Railway Shed, Map Room, Folk Court, Space Dome",
            noun="name",
        ),
        Category(
            "topic",
            "topic",
            "topics",
            "art, history, science, transport",
            after=("about {}", "devoted to {}"),
            asks=("What topic is {} about?", "What is {} devoted to?"),
        ),
        Tally("visitors", "visitors", Grid(1200, 9800, 100), past("attract", "attracted")),
        Measure(
            "fee",
            ("entry fee", "ticket price"),
            Grid(2, 28),
            "${}",
            big=("expensive", "more expensive", "most expensive"),
            small=("cheap", "cheaper", "cheapest"),
            asks=("How much does it cost to enter {}?",),
        ),
        Year("opened", ("opening year",), Grid(1840, 2018), "opened", latest="newest", earliest="oldest"),
    ),
)

STADIUMS = Table(
    "stadium",
    "stadium",
    "stadiums",
    (
        Key(
            "name",
            "Riverside Bowl, Thunder Dome, Victory Park, East Field, Union Ground, Cedar Court, "
            "Ocean Arena, Hill Stand, Mosaic Park, Copper Field",
        ),
        Category(
            "sport",
            "sport",
            "sports",
            "rugby, cricket, hockey",
            before=("{}",),
            after=("used for {}",),
            asks=("Which sport is played at {}?",),
        ),
        Tally("seats", "seats", Grid(4000, 52000, 500)),
        Year("built", ("construction year",), Grid(1921, 2016), "built", latest="newest", earliest="oldest"),
        Measure(
            "rent",
            ("rent", "daily rent"),
            Grid(300, 2800, 50),
            "${}",
            big=("expensive", "more expensive", "most expensive"),
            small=("cheap", "cheaper", "cheapest"),
            asks=("How much does it cost to rent {}?",),
        ),
    ),
)

CASTLES = Table(
    "castles",
    "castle",
    "castles",
    (
        Key(
            "castle",
            "Ravenholt, Burg Adler, Dunmore, Falkenau, Castel Rosso, Wyvern Keep, Bellegarde, "
            "Krakstein, Moat House, Torre Blanca, Greywatch, Karlsburg",
            noun="name",
        ),
        Category(
            "duchy",
            "duchy",
            "duchies",
            "Bavaria, Burgundy, Savoy, Tyrol",
            after=("in {}", "located in {}"),
            asks=("In which duchy is {}?", "Which duchy does {} belong to?"),
        ),
        Tally("towers", "towers", Grid(1, 13)),
        Year(
            "built", ("construction year",), Grid(1085, 1640, 5), "built", latest="newest", earliest="oldest"
        ),
        Measure(
            "wall_height",
            ("wall height",),
            Grid(6, 29),
            "{} m",
            asks=("How high are the walls of {}?",),
            extremes=("greatest", "lowest"),
        ),
    ),
)

TABLES = (CITIES, BRIDGES, HOTELS, MUSEUMS, STADIUMS, CASTLES)
