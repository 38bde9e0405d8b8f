"""Tables about mountains, waters and islands."""

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
)

MOUNTAINS = Table(
    "mountain",
    "mountain",
    "mountains",
    (
        Key(
            "name",
            "Mount Kelda, Grauhorn, Sierra Alta, Tolmin Peak, White Fang, Mount Orso, Dragon Tooth, "
            "Hallgrim, Pico Verde, Mount Ansel, Cold Spire, Teufelsberg",
        ),
        Category(
            "range",
            "range",
            "ranges",
            "Alps, Andes, Rockies",
            after=("in the {}",),
            asks=("Which range does {} belong to?", "In which range is {}?"),
        ),
        Measure(
            "height",
            ("height", "elevation"),
            Grid(1850, 6900, 50),
            "{} meters",
            big=("tall", "taller", "tallest"),
            small=("small", "lower", "lowest"),
            extremes=("greatest", "lowest"),
        ),
        Year("climbed", ("year of the first climb",), Grid(1802, 1968, 2), "climbed"),
        Tally("trails", "trails", Grid(1, 14)),
    ),
)

RIVERS = Table(
    "rivers",
    "river",
    "rivers",
    (
        Key(
            "river",
            "Alder, Brenna, Cauda, Dursk, Elmwater, Fosse, Garra, Hollin, Iskar, Jaruna, Kessel",
            noun="name",
        ),
        Category(
            "continent",
            "continent",
            "continents",
            "Africa, Asia, Europe",
            after=("in {}", "that flow through {}"),
            asks=("On which continent is the {}?",),
        ),
        Measure(
            "length_km",
            ("length",),
            Grid(120, 2900, 20),
            "{} km",
            big=("long", "longer", "longest"),
            small=("short", "shorter", "shortest"),
            extremes=("greatest", "smallest"),
            additive=True,
        ),
        Measure(
            "depth_m",
            ("depth",),
            Grid(3, 48),
            "{} m",
            big=("deep", "deeper", "deepest"),
            small=("shallow", "shallower", "shallowest"),
            extremes=("greatest", "smallest"),
        ),
        Tally("dams", "dams", Grid(0, 15)),
    ),
)

LAKES = Table(
    "lakes",
    "lake",
    "lakes",
    (
        Key(
            "name",
            "Lake Morra, Mirror Lake, Lake Tuva, Crater Pond, Lake Ilm, Heron Lake, Lake Sabine, "
            "Salt Basin, Lake Onde, Pike Water, Lake Brel",
        ),
        Category(
            "region",
            "region",
            "regions",
            "Tundra, Highlands, Lowlands",
            after=("in the {}", "located in the {}"),
            asks=("In which region is {}?",),
        ),
        Measure(
            "area",
            ("area", "surface area"),
            Grid(4, 280, 2),
            "{} square km",
            big=("large", "larger", "largest"),
            small=("small", "smaller", "smallest"),
            extremes=("largest", "smallest"),
            additive=True,
        ),
        Measure(
            "depth",
            ("depth",),
            Grid(5, 190, 5),
            "{} meters",
            big=("deep", "deeper", "deepest"),
            small=("shallow", "shallower", "shallowest"),
            extremes=("greatest", "smallest"),
        ),
        Tally("islands", "islands", Grid(0, 12)),
    ),
)

ISLANDS = Table(
    "island",
    "island",
    "islands",
    (
        Key(
            "name",
            "Skarra, Motu Nui, Palm Cay, Isla Roja, Fenwick, Tern Rock, Kauri, Santa Vela, Orrin, "
            "Coral Head, Yelso, Bantu Key",
        ),
        Category(
            "ocean",
            "ocean",
            "oceans",
            "Pacific, Atlantic, Arctic",
            after=("in the {}", "located in the {}"),
            asks=("Which ocean is {} in?", "In which ocean is {}?"),
        ),
        Measure(
            "area_km2",
            ("area", "surface area"),
            Grid(12, 940, 4),
            "{} square km",
            big=("large", "larger", "largest"),
            small=("small", "smaller", "smallest"),
            extremes=("largest", "smallest"),
            additive=True,
        ),
        Tally("residents", "residents", Grid(40, 8800, 20)),
        Tally("beaches", "beaches", Grid(1, 24)),
    ),
)

VOLCANOES = Table(
    "volcanoes",
    "volcano",
    "volcanoes",
    (
        Key(
            "name",
            "Ardent, Brimstone, Cerro Hondo, Djebel Nar, Emberhorn, Fumo, Gunung Api, Hekra, "
            "Ildfjell, Kamui, Lavatop",
        ),
        Category(
            "state",
            "state",
            "states",
            "active, dormant, extinct",
            before=("{}",),
            predicate="{}",
            asks=("What state is {} in?",),
        ),
        Category(
            "nation",
            "nation",
            "nations",
            "Chile, Iceland, Indonesia",
            after=("in {}", "located in {}"),
            asks=("Which nation is {} in?", "In which nation is {}?"),
        ),
        Measure(
            "elevation",
            ("elevation", "height"),
            Grid(720, 5900, 20),
            "{} meters",
            big=("high", "higher", "highest"),
            small=("low", "lower", "lowest"),
            asks=("How high is {}?",),
        ),
        Year("erupted", ("year of the last eruption",), Grid(1650, 2021), verb=past("erupt", "erupted")),
    ),
)

TABLES = (MOUNTAINS, RIVERS, LAKES, ISLANDS, VOLCANOES)
