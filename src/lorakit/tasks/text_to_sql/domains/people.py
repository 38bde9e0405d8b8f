"""Tables about people and what they do."""

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

AGE_BIG = ("old", "older", "oldest")
AGE_SMALL = ("young", "younger", "youngest")

PLAYERS = Table(
    "players",
    "player",
    "players",
    (
        Key(
            "name",
            "Ivo Brandt, Luis Prado, Sam Okoro, Tariq Aziz, Ben Holt, Marco Vidal, Jon Lund, "
            "Kofi Mensah, Rui Costa, Emil Novak, Dan Price, Yuki Mori, Pat O'Dell",
        ),
        Category(
            "team",
            "team",
            "teams",
            "Rovers, United, Wanderers, Athletic",
            after=("on {}", "who play for {}"),
            asks=("Which team does {} play for?",),
        ),
        Category(
            "position",
            "position",
            "positions",
            "goalkeeper, defender, forward",
            after=("who play as {}",),
            asks=("Which position does {} play?",),
        ),
        Tally("goals", "goals", Grid(0, 31), past("score", "scored")),
        Measure("age", ("age",), Grid(18, 38), "{}", AGE_BIG, AGE_SMALL),
    ),
    person=True,
)

EMPLOYEES = Table(
    "employees",
    "employee",
    "employees",
    (
        Key(
            "name",
            "Anna Reyes, Brian Cole, Chloe Park, David Stein, Elena Rossi, Frank Odum, Grace Liu, "
            "Henry Walsh, Ines Duarte, Jack Nolan, Karen Bose, Leo Fischer, Mia Torres, Noah Grant",
        ),
        Category(
            "department",
            "department",
            "departments",
            "Sales, Finance, Legal, Support",
            after=("in {}", "who work in {}"),
            asks=("Which department does {} work in?",),
        ),
        Measure(
            "salary",
            ("salary", "pay"),
            Grid(2400, 8900, 100),
            "${}",
            additive=True,
            verb=present("earn", "earns"),
        ),
        Measure("age", ("age",), Grid(22, 63), "{}", AGE_BIG, AGE_SMALL),
        Year("hired", ("hiring year",), Grid(1998, 2023), "hired"),
    ),
    person=True,
)

STUDENTS = Table(
    "student",
    "student",
    "students",
    (
        Key("name", "Abel, Bianca, Carlos, Dora, Edith, Felix, Gita, Hugo, Irene, Jonas, Kira, Lars"),
        Category(
            "major",
            "major",
            "majors",
            "biology, physics, law, music",
            before=("{}",),
            after=("who study {}",),
            asks=("What does {} study?",),
        ),
        Measure("score", ("score", "exam score"), Grid(41, 99)),
        Measure("age", ("age",), Grid(17, 29), "{}", AGE_BIG, AGE_SMALL),
        Tally("absences", "absences", Grid(0, 12)),
    ),
    person=True,
)

DOCTORS = Table(
    "doctors",
    "doctor",
    "doctors",
    (
        Key(
            "name",
            "Dr. Amin, Dr. Bell, Dr. Cruz, Dr. Dietz, Dr. Ebert, Dr. Fong, Dr. Gale, Dr. Hirsch, "
            "Dr. Imai, Dr. Joshi, Dr. Kahn",
        ),
        Category(
            "specialty",
            "specialty",
            "specialties",
            "cardiology, neurology, surgery",
            after=("specialized in {}", "who practice {}"),
            asks=("What is {} specialized in?",),
        ),
        Category(
            "hospital",
            "hospital",
            "hospitals",
            "St. Mary, City Clinic, Westside",
            after=("at {}", "who work at {}"),
            asks=("At which hospital does {} work?", "Where does {} work?"),
        ),
        Tally("patients", "patients", Grid(20, 190)),
        Measure(
            "fee", ("fee", "consultation fee"), Grid(40, 220, 5), "${}", verb=present("charge", "charges")
        ),
    ),
    person=True,
)

SINGERS = Table(
    "singer",
    "singer",
    "singers",
    (
        Key(
            "name",
            "Adela, Bruno Sky, Cass Lane, Dmitri, Eva Stone, Faro, Gigi Moon, Hal Rivers, Ione, Jax, "
            "Kit Marlon",
        ),
        Category(
            "genre",
            "genre",
            "genres",
            "jazz, pop, folk, soul",
            before=("{}",),
            after=("who sing {}",),
            asks=("Which genre does {} sing?",),
        ),
        Tally("albums", "albums", Grid(1, 19), past("release", "released")),
        Tally("awards", "awards", Grid(0, 15), past("win", "won")),
        Year("born", ("birth year", "year of birth"), Grid(1948, 2002), "born", "youngest", "oldest"),
    ),
    person=True,
)

RUNNERS = Table(
    "runners",
    "runner",
    "runners",
    (
        Key(
            "runner",
            "Abdi, Bekele, Carmen, Dawit, Esther, Fiona, Gebre, Hanne, Ismael, Jelena, Kamau, Leila",
            noun="name",
        ),
        Category(
            "nation",
            "nation",
            "nations",
            "Ethiopia, Spain, Finland",
            after=("from {}", "who come from {}"),
            asks=("Which nation is {} from?", "Where is {} from?"),
        ),
        Measure(
            "distance",
            ("distance",),
            Grid(5, 84),
            "{} km",
            verb=past("run", "ran"),
            extremes=("longest", "shortest"),
            additive=True,
            asks=("How far did {} run?", "How many km did {} run?"),
        ),
        Measure("age", ("age",), Grid(19, 47), "{}", AGE_BIG, AGE_SMALL),
        Tally("medals", "medals", Grid(0, 9), past("win", "won")),
    ),
    person=True,
)

TEACHERS = Table(
    "teacher",
    "teacher",
    "teachers",
    (
        Key(
            "name",
            "Mr. Abbot, Ms. Boyle, Mr. Chan, Ms. Dunn, Mr. Evans, Ms. Ford, Mr. Gomez, Ms. Hart, "
            "Mr. Ito, Ms. James",
        ),
        Category(
            "subject",
            "subject",
            "subjects",
            "math, geography, chemistry",
            before=("{}",),
            after=("who teach {}",),
            asks=("Which subject does {} teach?", "What does {} teach?"),
        ),
        Tally("classes", "classes", Grid(2, 9), present("teach", "teaches")),
        Measure(
            "experience",
            ("experience",),
            Grid(1, 36),
            "{} years",
            ("experienced", "more experienced", "most experienced"),
            ("inexperienced", "less experienced", "least experienced"),
            extremes=("longest", "shortest"),
            asks=("How many years of experience does {} have?",),
        ),
        Year("started", ("starting year",), Grid(1986, 2022), verb=past("start", "started")),
    ),
    person=True,
)

SWIMMERS = Table(
    "swimmers",
    "swimmer",
    "swimmers",
    (
        Key(
            "name",
            "Aiko Tan, Bjorn Dahl, Cleo Marsh, Dina Petrov, Erik Sand, Flora Vance, Gus Keller, "
            "Hina Sato, Ilya Orlov, Jody Blake, Kim Soo, Lola Finch",
        ),
        Category(
            "club",
            "club",
            "clubs",
            "Dolphins, Marlins, Barracudas",
            after=("in the {}", "who swim for the {}"),
            asks=("Which club does {} swim for?",),
        ),
        Category(
            "stroke",
            "stroke",
            "strokes",
            "butterfly, freestyle, backstroke",
            before=("{}",),
            after=("specialized in {}",),
            asks=("Which stroke is {} specialized in?",),
        ),
        Tally("races", "races", Grid(3, 44), past("win", "won")),
        Measure(
            "height_cm",
            ("height",),
            Grid(158, 203),
            "{} cm",
            ("tall", "taller", "tallest"),
            ("short", "shorter", "shortest"),
        ),
    ),
    person=True,
)

CHEFS = Table(
    "chef",
    "chef",
    "chefs",
    (
        Key(
            "name",
            "Alain Roux, Bea Morello, Chen Wei, Dalia Haddad, Enzo Ricci, Freya Holm, Goro Ueda, "
            "Hector Luna, Isla Munro, Jamal Reed, Katya Belov",
        ),
        Category(
            "cuisine",
            "cuisine",
            "cuisines",
            "Greek, Turkish, Korean, Brazilian",
            before=("{}",),
            after=("specialized in {} food",),
            asks=("Which cuisine does {} cook?",),
        ),
        Tally("stars", "stars", Grid(0, 7)),
        Measure("wage", ("wage", "hourly wage"), Grid(18, 76), "${}", verb=present("earn", "earns")),
        Year("joined", ("joining year", "year of joining"), Grid(2001, 2024), verb=past("join", "joined")),
    ),
    person=True,
)

TABLES = (PLAYERS, EMPLOYEES, STUDENTS, DOCTORS, SINGERS, RUNNERS, TEACHERS, SWIMMERS, CHEFS)
