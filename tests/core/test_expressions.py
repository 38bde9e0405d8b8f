"""Expressions of strangers: what `re` says, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from lorakit.core.expressions import LONGEST, Expression
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
    ("text", "says"),
    [
        ("(", "not a regular expression"),
        ("*a", "not a regular expression"),
        (r"(a)\1", "a back-reference"),
        (r"(a)?(?(1)b|c)", "choice by an earlier group"),
        ("(" * 3000 + ")" * 3000, "nests too deeply"),
        ("a{99999999999999999999}", "counts too far"),
        ("a" * (LONGEST + 1), "characters; at most"),
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
