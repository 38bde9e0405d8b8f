"""Expressions of strangers: what `re` says, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time
import tracemalloc

import pytest

from lorakit.core import effort, expressions
from lorakit.core.effort import shared_effort
from lorakit.core.expressions import LONGEST, Expression, expression
from lorakit.core.selection import fullmatch, pattern_matches
from lorakit.errors import ConfigError

PATHS = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
LEGITIMATE = [
    r".*\.(q|v)_proj",
    r"^model\.layers\.(?:\d+)\..*",
    r"^model\.layers\.(?:0|10)\..*(?:up|down)_proj$",
    r".*layers\.(\d+|x)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj.*",
    r"(?!.*mlp).*proj",
    r"(?i).*Q_PROJ",
    r".*(?<=self_attn\.)q_proj",
    r"(\w+\.)*up_proj",
    r"(?:[^.]+\.){3,4}[qv]_proj",
    r"model\.layers\.0\.self_attn\.q_proj",
    r".*\bmlp\b.*",
    r"(?s:.*?)_proj",
    r"(?:[^.]*?\.)+?(?i:V_PROJ)",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"^(?!.*mlp).*(?:q_proj|v_proj).*",
    r"(?:.*?(?:vision|model).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.down_proj)",
    r".+q_proj|(?!)",
    "model.layers.0.self_attn.q_proj|model.layers.1.mlp.up_proj",
    r"model\.layers\.0\.mlp\.up_proj|model\.layers\.10\.mlp\.up_proj",
    r"model.layers.(0|1)(?:.mlp)?(?:\..+)+",
]
EVIL = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+$",
    r"((a*)*)*$",
    r".*" * 30 + "x",
    r"(.*a){25}x",
    r"(a?){60}a{60}x",
    r"(a|b|ab)*c",
]


@pytest.mark.parametrize("text", LEGITIMATE)
def test_what_people_write_means_what_re_says(text: str) -> None:
    found = fullmatch(text, PATHS)
    assert found == [path for path in PATHS if re.fullmatch(text, path)]
    assert found


@pytest.mark.parametrize(
    "key", [r"(q|v)_proj", r"layers\.(0|1)\..*", r"^model\.layers\.1.*", "q_proj", "proj", r"\d+"]
)
def test_the_end_of_a_path_means_what_re_says(key: str) -> None:
    assert [pattern_matches(key, path) for path in PATHS] == [
        re.match(rf"(.*\.)?({key})$", path) is not None for path in PATHS
    ]


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("path", ["a" * 60 + "!", "a" * 120, "model." + "ab" * 40])
def test_an_evil_expression_ends_at_once(text: str, path: str) -> None:
    started = time.perf_counter()
    for ask in (lambda: fullmatch(text, [path]), lambda: pattern_matches(text, path)):
        with contextlib.suppress(ConfigError):  # too many steps
            ask()
    assert time.perf_counter() - started < 5  # `re` needs longer than anyone waits


def test_an_evil_expression_has_an_answer() -> None:
    assert Expression("(a+)+").matches("a" * 60)
    assert not Expression("(a+)+").matches("a" * 60 + "!")
    assert Expression("(a|aa)+b?").matches("a" * 60 + "b")


def test_steps_are_counted() -> None:
    ahead = "a"
    for _ in range(4):  # each look ahead starts all over at every letter
        ahead = f"(?:(?={ahead}*x?)a)"
    with pytest.raises(ConfigError, match=r"too many steps.*name the layers in a list"):
        Expression(f"{ahead}*").matches("a" * 200)


@pytest.mark.parametrize(
    "text",
    [
        "(?:(?=(?:[a-z.]" + "|" * 9_000 + ")*)[a-z.])*!",
        "(?:(?:){9}){9}" * 700 + "(?:(?:){9999}){9999}(?=b)",
    ],
)
def test_ways_of_nothing_are_counted(text: str) -> None:
    started, known = time.perf_counter(), Expression(text)
    with pytest.raises(ConfigError, match="too many steps"):
        known.matches("model.layers" + "a" * 200)
    assert time.perf_counter() - started < 5


def test_the_expressions_of_a_file_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_STEPS_OF_A_FILE", 10**6)  # a tenth, for a quick test

    def read() -> None:
        for n in range(1_000_000):
            known = Expression(rf"(\w+\.)*x{n}(a|b)")
            for path in PATHS:
                known.matches(path)

    started = time.perf_counter()
    with shared_effort(), pytest.raises(ConfigError, match="after the other patterns of its file"):
        read()
    with shared_effort():  # another file
        assert Expression(r"(\w+\.)*q_proj").matches(PATHS[0])
    assert time.perf_counter() - started < 5


def test_what_is_kept_ready_is_small() -> None:
    tracemalloc.start()
    try:
        expression("(x|y)" + "(?:abcdefgh)*" * 60)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 200 * 785
    for n in range(100):
        expression(f"{n}." + "a" * 5_000)
    assert sum(len(text) for text, _ in expressions._known) <= expressions._REMEMBERED


def test_many_plain_names_may_be_long() -> None:
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in range(2_000)]
    text = "|".join(map(re.escape, paths))
    assert len(text) > LONGEST
    assert fullmatch(text, [*paths, "model.layers.0.mlp"]) == paths


@pytest.mark.parametrize(
    ("text", "path"),
    [(r"(?a:\w+)x?", "é"), (r"(?a:[^é]\w*)é?", "aé"), (r"(?a:\w(?u:\w+))x?", "aéx"), ("(?i:É)b?", "é")],
)
def test_flags_inside_mean_what_re_says(text: str, path: str) -> None:
    assert Expression(text).matches(path) is (re.fullmatch(text, path) is not None)


def test_what_can_never_match_matches_nothing() -> None:
    for text in ("(?!)", "a*(?!)", "(?:(?!))+"):
        assert not Expression(text).matches("a")
        assert not Expression(text).matches("")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(", "not a regular expression"),
        ("*a", "not a regular expression"),
        (r"(a)\1", "a back-reference"),
        (r"(a)?(?(1)b|c)", "choice by an earlier group"),
        ("(" * 3000 + ")" * 3000, "nests too deeply"),
        ("a{99999999999999999999}", "counts too far"),
        ("a." * LONGEST, "characters; at most"),
        ("a{" + "9" * 5000 + "}", "not a regular expression|counts too far"),
        ("(?=" * 280 + "a" + ")" * 280, "nests too deeply"),
        ("(?a)(?u)b", "not a regular expression"),
        ("(?<=a|bc)d", "look-behind requires fixed-width"),
        ("(?<!a*)d", "look-behind requires fixed-width"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Expression(text)


def test_chance_expressions_mean_what_re_says() -> None:
    """Small trees over a small alphabet, matched with all kinds of texts."""
    draw = random.Random(0)

    def tree(depth: int) -> str:
        kind = draw.randrange(9) if depth else 0
        if kind <= 2:
            return draw.choice(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", r"\b", "", "a"])
        if kind <= 4:
            return tree(depth - 1) + tree(depth - 1)
        if kind == 5:
            return f"(?:{tree(depth - 1)}|{tree(depth - 1)})"
        if kind == 6:
            return f"(?:{tree(depth - 1)}){draw.choice(['*', '+', '?', '*?', '{2}', '{1,3}', '{2,}'])}"
        if kind == 7:
            return f"({draw.choice(['?=', '?!'])}{tree(depth - 1)})"
        return f"(?<{draw.choice('=!')}{draw.choice(['a', 'ab', '.b'])})"

    texts = ["".join(draw.choice("ab.") for _ in range(draw.randrange(7))) for _ in range(40)]
    matched = 0
    for _ in range(600):
        pattern = tree(4)
        for text in draw.sample(texts, 8):
            expected = re.fullmatch(pattern, text) is not None
            assert Expression(pattern).matches(text) is expected, (pattern, text)
            matched += expected
    assert matched > 200
