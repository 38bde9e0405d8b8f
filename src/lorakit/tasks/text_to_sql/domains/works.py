"""Tables about films, books, music, courses and games."""

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

LONG = ("long", "longer", "longest")
SHORT = ("short", "shorter", "shortest")

FILMS = Table(
    "films",
    "film",
    "films",
    (
        Key(
            "title",
            "Night Ferry, The Last Orchard, Paper Moons, Red Harvest, Silent Coast, Two Suns, "
            "Broken Compass, Lemon Tree, Winter Toll, Glass River, Dust Road, Harbor Lights",
            noun="title",
        ),
        Category(
            "genre",
            "genre",
            "genres",
            "drama, comedy, thriller",
            before=("{}",),
            asks=("What is the genre of {}?",),
        ),
        Category(
            "director",
            "director",
            "directors",
            "Lena Frost, Omar Said, Paul Greer",
            after=("by {}", "directed by {}"),
            asks=("Who directed {}?", "Who is the director of {}?"),
        ),
        Year("year", ("release year", "year"), Grid(1961, 2022), "released", "newest", "oldest"),
        Measure(
            "minutes",
            ("running time", "length"),
            Grid(74, 188),
            "{} minutes",
            LONG,
            SHORT,
            extremes=("longest", "shortest"),
            additive=True,
        ),
        Measure("rating", ("rating", "score"), Grid(3.1, 9.4, 0.1)),
    ),
)

BOOKS = Table(
    "book",
    "book",
    "books",
    (
        Key(
            "title",
            "The Salt Road, Owl Winter, Quiet Engines, A Map of Rain, Thirteen Doors, Blue Hour, "
            "The Beekeeper, Far Shore, Stone Letters, Under Elms, The Clockmaker's Son",
            noun="title",
        ),
        Category(
            "author",
            "author",
            "authors",
            "Nora Flint, Hugh Marsh, Ana Silva",
            after=("by {}", "written by {}"),
            asks=("Who wrote {}?", "Who is the author of {}?"),
        ),
        Category(
            "language",
            "language",
            "languages",
            "English, French, German",
            before=("{}",),
            after=("written in {}",),
            asks=("In which language is {} written?",),
        ),
        Tally("pages", "pages", Grid(96, 720, 4)),
        Year("published", ("publication year",), Grid(1948, 2021), "published", "newest", "oldest"),
    ),
)

SONGS = Table(
    "songs",
    "song",
    "songs",
    (
        Key(
            "title",
            "Golden Hour, Runaway Train, Velvet Sky, Echoes, Paper Hearts, Midnight Bus, Slow Dance, "
            "Wildfire, Homebound, Neon Rain, Sugar, Long Way Down",
            noun="title",
        ),
        Category(
            "artist",
            "artist",
            "artists",
            "The Foxes, Mara Lin, DJ Kolt, Blue Tin",
            after=("by {}", "recorded by {}"),
            asks=("Who recorded {}?", "Who is the artist of {}?"),
        ),
        Measure(
            "seconds",
            ("length", "duration"),
            Grid(121, 420),
            "{} seconds",
            LONG,
            SHORT,
            extremes=("longest", "shortest"),
            additive=True,
        ),
        Tally("plays", "plays", Grid(110, 9900, 10)),
        Year("year", ("release year", "year"), Grid(1979, 2023), "released", "newest", "oldest"),
    ),
)

COURSES = Table(
    "courses",
    "course",
    "courses",
    (
        Key(
            "course",
            "Algebra, Botany, Ceramics, Databases, Ethics, French Film, Genetics, Harmony, "
            "Irish Myth, Jewelry, Knots",
            noun="name",
        ),
        Category(
            "room",
            "room",
            "rooms",
            "A1, B2, C3",
            after=("in room {}", "held in room {}"),
            asks=("In which room is {} held?",),
        ),
        Category(
            "day",
            "day",
            "days",
            "Monday, Tuesday, Friday",
            after=("on {}", "held on {}"),
            asks=("On which day is {} held?",),
        ),
        Tally("students", "students", Grid(6, 90)),
        Measure(
            "fee",
            ("fee", "price"),
            Grid(20, 480, 10),
            "${}",
            ("expensive", "more expensive", "most expensive"),
            ("cheap", "cheaper", "cheapest"),
            present("cost", "costs"),
            additive=True,
        ),
    ),
)

CONCERTS = Table(
    "concert",
    "concert",
    "concerts",
    (
        Key(
            "event",
            "Brass Night, Opera Gala, Choir Day, Rock Fest, Piano Hour, Drum Circle, String Fling, "
            "Organ Week, Harp Evening, Big Band",
            noun="name",
        ),
        Category(
            "venue",
            "venue",
            "venues",
            "Town Hall, Dome, Old Theater",
            after=("at the {}", "held at the {}"),
            asks=("At which venue is {} held?", "Where is {} held?"),
        ),
        Tally("tickets", "tickets", Grid(80, 2400, 20), past("sell", "sold")),
        Measure(
            "price",
            ("ticket price", "price"),
            Grid(8, 120, 2),
            "${}",
            ("expensive", "more expensive", "most expensive"),
            ("cheap", "cheaper", "cheapest"),
            present("cost", "costs"),
        ),
        Tally("performers", "performers", Grid(1, 60)),
    ),
)

PAINTINGS = Table(
    "paintings",
    "painting",
    "paintings",
    (
        Key(
            "title",
            "Girl with a Fan, Burning Barn, Still Water, Three Pears, The Tailor, Dawn at Sea, "
            "Empty Chair, Market Square, Self-Portrait, The Duel, White Horse",
            noun="title",
        ),
        Category(
            "painter",
            "painter",
            "painters",
            "Aldo Merz, Vera Kohl, Jan Brink",
            after=("by {}", "painted by {}"),
            asks=("Who painted {}?", "Who is the painter of {}?"),
        ),
        Category(
            "style",
            "style",
            "styles",
            "cubist, baroque, modern",
            before=("{}",),
            asks=("In which style is {} painted?",),
        ),
        Year("year", ("year",), Grid(1640, 1990, 5), "painted", "newest", "oldest"),
        Measure(
            "value",
            ("value", "estimated value"),
            Grid(500, 9700, 50),
            "${}",
            ("valuable", "more valuable", "most valuable"),
            ("cheap", "less valuable", "least valuable"),
            additive=True,
        ),
    ),
)

GAMES = Table(
    "board_games",
    "board game",
    "board games",
    (
        Key(
            "game",
            "Castle Rush, Moon Traders, Hex Garden, Pirate Bay, Word Forge, Dragon Dice, "
            "Silk Routes, Ant Farm, Last Ember, Tower Nine, Fish Market, Code Breakers",
            noun="name",
        ),
        Category(
            "publisher",
            "publisher",
            "publishers",
            "Oakleaf, Red Pawn, Kobold",
            after=("by {}", "published by {}"),
            asks=("Who published {}?", "Which publisher made {}?"),
        ),
        Tally("players", "players", Grid(2, 8), present("allow", "allows")),
        Measure(
            "minutes",
            ("playing time",),
            Grid(10, 190, 5),
            "{} minutes",
            LONG,
            SHORT,
            extremes=("longest", "shortest"),
        ),
        Measure(
            "price",
            ("price", "cost"),
            Grid(9, 95),
            "${}",
            ("expensive", "more expensive", "most expensive"),
            ("cheap", "cheaper", "cheapest"),
            present("cost", "costs"),
            additive=True,
        ),
        Measure(
            "weight",
            ("weight",),
            Grid(0.4, 4.8, 0.1),
            "{} kg",
            ("heavy", "heavier", "heaviest"),
            ("light", "lighter", "lightest"),
        ),
    ),
)

PODCASTS = Table(
    "podcast",
    "podcast",
    "podcasts",
    (
        Key(
            "title",
            "Odd Facts, Deep Dive, Kitchen Talk, Cold Files, Star Gazers, Money Maze, Book Nook, "
            "Trail Mix, Sound Bites, Garden Gate, Late Shift",
            noun="title",
        ),
        Category(
            "host",
            "host",
            "hosts",
            "Tess Avery, Milo Grant, Rosa Quinn",
            after=("hosted by {}", "with host {}"),
            asks=("Who hosts {}?", "Who is the host of {}?"),
        ),
        Category(
            "topic",
            "topic",
            "topics",
            "crime, cooking, nature, finance",
            after=("about {}",),
            asks=("What is {} about?",),
        ),
        Tally("episodes", "episodes", Grid(9, 260)),
        Tally("listeners", "listeners", Grid(300, 9600, 50)),
    ),
)

TABLES = (FILMS, BOOKS, SONGS, COURSES, CONCERTS, PAINTINGS, GAMES, PODCASTS)
