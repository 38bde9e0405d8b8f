"""Tables about organisations, traffic and space."""

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

COSTS = present("cost", "costs")
DEAR = ("expensive", "more expensive", "most expensive")
CHEAP = ("cheap", "cheaper", "cheapest")
LARGE = ("large", "larger", "largest")
SMALL = ("small", "smaller", "smallest")

COMPANIES = Table(
    "companies",
    "company",
    "companies",
    (
        Key(
            "company",
            "Acorn, Bluestone, Cobalt, Dynamo, Elkwood, Fennel, Granary, Hexatec, Inkwell, Junction, "
            "Kestrel, Lumen",
            noun="name",
        ),
        Category(
            "sector",
            "sector",
            "sectors",
            "retail, energy, software, mining",
            before=("{}",),
            after=("in the {} sector",),
            asks=("Which sector is {} in?",),
        ),
        Tally("staff", "people", Grid(15, 900, 5), present("employ", "employs")),
        Measure("revenue", ("revenue", "yearly revenue"), Grid(2, 180), "{} million", additive=True),
        Year("founded", ("founding year",), Grid(1890, 2020), "founded", latest="newest", earliest="oldest"),
    ),
)

FLIGHTS = Table(
    "flights",
    "flight",
    "flights",
    (
        Key(
            "code",
            "AX101, BK220, CM318, DL407, EV512, FR636, GA744, HU815, IB909, JQ118, KL233, LX345",
            noun="code",
        ),
        Category(
            "origin",
            "origin",
            "origins",
            "Paris, Delhi, Cairo",
            after=("from {}", "that leave from {}"),
            asks=("Where does flight {} leave from?",),
        ),
        Category(
            "destination",
            "destination",
            "destinations",
            "Sydney, Madrid, Toronto, Seoul",
            after=("to {}", "that go to {}"),
            asks=("Where does flight {} go to?", "What is the destination of flight {}?"),
        ),
        Measure("price", ("price", "fare"), Grid(90, 980, 10), "${}", DEAR, CHEAP, COSTS, additive=True),
        Tally("seats", "seats", Grid(40, 360, 4)),
    ),
)

SHIPS = Table(
    "ships",
    "ship",
    "ships",
    (
        Key(
            "name",
            "Aurora, Bellona, Corsair, Dauntless, Esmeralda, Fortuna, Gannet, Hydra, Intrepid, "
            "Juno Star, Kraken",
        ),
        Category(
            "type",
            "type",
            "types",
            "tanker, ferry, cruiser",
            after=("of type {}",),
            asks=("What type of ship is {}?",),
        ),
        Measure(
            "length",
            ("length",),
            Grid(45, 330, 5),
            "{} meters",
            ("long", "longer", "longest"),
            ("short", "shorter", "shortest"),
            extremes=("greatest", "smallest"),
        ),
        Tally("crew", "crew members", Grid(8, 140)),
        Year("launched", ("launch year",), Grid(1961, 2019), "launched", "newest", "oldest"),
    ),
)

RESTAURANTS = Table(
    "restaurant",
    "restaurant",
    "restaurants",
    (
        Key(
            "name",
            "Basil & Co, Chez Odile, Dockside, El Toro, Fig Tree, Ginger Pot, Hearth, Izakaya Ten, "
            "Juniper, Kebab King, Little Rome",
        ),
        Category(
            "food",
            "food",
            "kinds of food",
            "sushi, pizza, seafood, kebab",
            before=("{}",),
            after=("that serve {}",),
            asks=("What food does {} serve?", "What does {} serve?"),
        ),
        Category(
            "area",
            "area",
            "areas",
            "Riverside, Downtown, Old Town",
            after=("in {}", "located in {}"),
            asks=("In which area is {}?", "Where is {}?"),
        ),
        Measure("rating", ("rating", "guest rating"), Grid(2.1, 4.9, 0.1)),
        Tally("tables", "tables", Grid(6, 48)),
    ),
)

UNIVERSITIES = Table(
    "university",
    "university",
    "universities",
    (
        Key(
            "name",
            "Aldridge, Bexford, Carrow, Danforth, Eastlake, Fairmount, Greystone, Hartwell, "
            "Ivybridge, Kingsley, Larkin",
        ),
        Category(
            "state",
            "state",
            "states",
            "Ohio, Texas, Maine",
            after=("in {}", "located in {}"),
            asks=("Which state is {} in?", "In which state is {}?"),
        ),
        Tally("students", "students", Grid(1200, 38000, 200)),
        Measure("tuition", ("tuition", "tuition fee"), Grid(4200, 39000, 200), "${}", DEAR, CHEAP),
        Year("founded", ("founding year",), Grid(1801, 1978), "founded", latest="newest", earliest="oldest"),
    ),
)

MOONS = Table(
    "moons",
    "moon",
    "moons",
    (
        Key(
            "moon",
            "Arche, Borr, Calyx, Dione B, Echo, Fenrir, Gorgo, Hebe, Ixion, Janus B, Kore",
            noun="name",
        ),
        Category(
            "planet",
            "planet",
            "planets",
            "Jupiter, Saturn, Neptune",
            after=("of {}", "that orbit {}"),
            asks=("Which planet does {} orbit?",),
        ),
        Measure(
            "diameter",
            ("diameter",),
            Grid(20, 4800, 20),
            "{} km",
            LARGE,
            SMALL,
            extremes=("largest", "smallest"),
        ),
        Measure(
            "days",
            ("orbital period",),
            Grid(2, 96),
            "{} days",
            extremes=("longest", "shortest"),
            asks=("How many days does an orbit of {} take?",),
        ),
        Year("discovered", ("discovery year", "year of discovery"), Grid(1671, 2003), "discovered"),
    ),
)

TRAINS = Table(
    "trains",
    "train",
    "trains",
    (
        Key(
            "train",
            "Meteor, Sea Breeze, Night Owl, Capital, Alpine, Coaster, Sunrise, Pioneer, Prairie, Metro Link",
            noun="name",
        ),
        Category(
            "station",
            "station",
            "stations",
            "Central, Harbor, Airport",
            after=("from {}", "that leave from {}"),
            asks=("From which station does {} leave?",),
        ),
        Measure(
            "speed",
            ("speed", "top speed"),
            Grid(80, 310, 5),
            "{} km/h",
            ("fast", "faster", "fastest"),
            ("slow", "slower", "slowest"),
        ),
        Tally("cars", "cars", Grid(3, 18)),
        Tally("stops", "stops", Grid(1, 27), past("make", "made")),
    ),
)

FARMS = Table(
    "farm",
    "farm",
    "farms",
    (
        Key(
            "farm",
            "Appleby, Brookside, Cloverdale, Dewfield, Elm Farm, Foxhill, Greenacre, Hayward, "
            "Larkrise, Meadowlea",
            noun="name",
        ),
        Category(
            "crop",
            "main crop",
            "main crops",
            "wheat, maize, barley, oats",
            before=("{}",),
            after=("that grow {}",),
            asks=("What does {} grow?", "What is the main crop of {}?"),
        ),
        Measure(
            "acres",
            ("area",),
            Grid(20, 780, 10),
            "{} acres",
            LARGE,
            SMALL,
            extremes=("largest", "smallest"),
            additive=True,
        ),
        Tally("cows", "cows", Grid(0, 160)),
        Tally("workers", "workers", Grid(1, 28), present("employ", "employs")),
    ),
)

ROBOTS = Table(
    "robots",
    "robot",
    "robots",
    (
        Key(
            "robot",
            "Atlas-7, Bitsy, Clank, Droid Max, Echo-2, Fetchit, Gizmo, Helper One, Ironclad, Jabber, Kip",
            noun="name",
        ),
        Category(
            "job",
            "job",
            "jobs",
            "welding, cleaning, packing",
            before=("{}",),
            after=("used for {}", "built for {}"),
            asks=("What job does {} do?",),
        ),
        Category(
            "lab",
            "lab",
            "labs",
            "Zurich, Kyoto, Austin",
            after=("from the {} lab",),
            asks=("Which lab does {} come from?",),
        ),
        Measure(
            "speed",
            ("speed", "top speed"),
            Grid(0.5, 7.5, 0.1),
            "{} km/h",
            ("fast", "faster", "fastest"),
            ("slow", "slower", "slowest"),
        ),
        Tally("arms", "arms", Grid(1, 6)),
        Year(
            "built",
            ("construction year", "year of construction"),
            Grid(1999, 2024),
            "built",
            "newest",
            "oldest",
        ),
    ),
)

TABLES = (COMPANIES, FLIGHTS, SHIPS, RESTAURANTS, UNIVERSITIES, MOONS, TRAINS, FARMS, ROBOTS)
