"""Strands: who says each token, and texts that are whole whatever the tokens cut through."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.train.examples import Example
from lorakit.train.render import Renderer
from lorakit.train.strands import (
    Strand,
    conversation_strand,
    pieces_of,
    runs_of,
    token_roles,
    token_strand,
)
from tests.tiny_chat import TEMPLATE, tiny_tokenizer

TALK = Example(
    "t",
    (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "안녕"},
        {"role": "user", "content": "u"},
    ),
    "🙂",
    learn_all=True,
)


def said_by(template: str, example: Example = TALK) -> list[tuple[str, str]]:
    tokenizer = tiny_tokenizer(template)
    row = Renderer(tokenizer).row(example)
    pieces = pieces_of(conversation_strand(tokenizer, row), tokenizer)
    found: list[tuple[str, str]] = []
    for piece in pieces:
        if found and found[-1][0] == piece.role:
            found[-1] = (piece.role, found[-1][1] + piece.text)
        else:
            found.append((piece.role, piece.text))
    return found


def test_who_says_what() -> None:
    assert said_by(TEMPLATE) == [
        ("system", "<|im_start|>system\nS<|im_end|>\n"),
        ("user", "<|im_start|>user\nhé<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n안녕<|im_end|>\n"),
        ("user", "<|im_start|>user\nu<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n🙂<|im_end|>"),
    ]


def test_a_template_that_wants_a_user_first_still_tells_the_turns() -> None:
    strict = "{% if messages | length == 1 and messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert [role for role, _ in said_by(strict + TEMPLATE)][1:] == ["assistant", "user", "assistant"]


def test_learnt_runs_are_the_answers() -> None:
    tokenizer = tiny_tokenizer()
    strand = conversation_strand(tokenizer, Renderer(tokenizer).row(TALK))
    runs = runs_of(pieces_of(strand, tokenizer))
    assert ["".join(piece.text for piece in pieces) for learnt, _, pieces in runs if learnt] == [
        "안녕<|im_end|>",
        "🙂<|im_end|>",
    ]


def test_plain_texts_and_unknown_examples_name_nobody() -> None:
    tokenizer = tiny_tokenizer()
    row = Renderer(tokenizer).row(Example("t", (), "ab"))
    assert conversation_strand(tokenizer, row).roles == ()
    assert token_roles(tokenizer, None, row.ids) == ()
    assert token_roles(tokenizer, TALK, [1, 2, 3]) == ()


def test_rows_with_one_label_learn_no_token() -> None:
    class Labelled:
        ids, labels = (5, 6), (1,)

    assert token_strand(Labelled()) == Strand((5, 6), (False, False))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<|"), max_size=30))
def test_the_pieces_are_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer(text)["input_ids"])
    pieces = pieces_of(Strand(ids, (False,) * len(ids)), tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    assert tuple(token for piece in pieces for token in piece.ids) == ids
