"""Rows as strands of tokens, for people to look at: which tokens are learnt, and who says them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.models.conversation import same_beginning
from lorakit.train.examples import Example
from lorakit.train.render import IGNORED, Rendered, Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"  # what a character decodes to of which a token holds only some bytes


@dataclass(frozen=True)
class Strand:
    """Tokens that the model reads, or writes, in one go.

    Attributes:
        ids: Token ids.
        learnt: For each token whether it is learnt.
        roles: For each token who says it (``user``, ``assistant``, ...); empty where nobody is named.
        name: What the strand is, where a row has several.
        note: What else is learnt from it, such as a label.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    roles: tuple[str, ...] = ()
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Piece:
    """Some tokens that are one text: mostly one; several where they share a character.

    Attributes:
        text: What they say.
        ids: Token ids.
        learnt: Whether they are learnt.
        role: Who says them; empty where nobody is named.
    """

    text: str
    ids: tuple[int, ...]
    learnt: bool
    role: str


def token_strand(row: Any, name: str = "") -> Strand:
    """A row of ids, whose labels are one a token, -100 where nothing is learnt; else nothing of it is."""
    ids, labels = tuple(row.ids), tuple(getattr(row, "labels", ()))
    aligned = len(labels) == len(ids) and len(ids) > 1
    learnt = tuple(label != IGNORED for label in labels) if aligned else (False,) * len(ids)
    return Strand(ids, learnt, name=name)


def conversation_strand(tokenizer: PreTrainedTokenizerBase, row: Rendered, name: str = "") -> Strand:
    """A rendered conversation; who says a token is known where the tokenizer tells its place in the text."""
    learnt = tuple(label != IGNORED for label in row.labels)
    return Strand(row.ids, learnt, token_roles(tokenizer, row.example, row.ids), name)


def token_roles(
    tokenizer: PreTrainedTokenizerBase, example: Example | None, ids: Sequence[int]
) -> tuple[str, ...]:
    """Who says each token of a rendered conversation; empty where that cannot be told.

    The borders are those of the cumulative renderings: the first turn, the first two, and so on.
    """
    if example is None or not example.messages or not tokenizer.is_fast:
        return ()
    renderer = Renderer(tokenizer)
    turns = example.turns[: max(example.learnt_turns) + 1]
    text = renderer.answered_text(turns, example.id, example.tools)
    borders, end = [], 0
    for number in range(1, len(turns)):
        try:
            part = renderer.whole_text(turns[:number], example.tools)
        except DataError:  # a template that wants a user's turn first: the next turn's border takes it in
            part = ""
        end = max(end, same_beginning(part, text))
        borders.append(end)
    encoded = tokenizer(
        text, add_special_tokens=not renderer.chat, return_offsets_mapping=True, verbose=False
    )
    if list(encoded["input_ids"][: len(ids)]) != list(ids):
        return ()
    names = [turn["role"] for turn in turns]
    return tuple(names[bisect_right(borders, start)] for start, _ in encoded["offset_mapping"][: len(ids)])


def pieces_of(strand: Strand, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The texts of a strand's tokens, in their order; together they are its text."""
    found: list[Piece] = []
    said, waiting = "", []
    roles = strand.roles or ("",) * len(strand.ids)
    for number, token in enumerate(strand.ids):
        waiting.append(token)
        text = str(tokenizer.decode(list(strand.ids[: number + 1])))
        last = number == len(strand.ids) - 1
        if text.endswith(_UNFINISHED) and not last and len(waiting) < 8:
            continue
        new = text[len(said) :] if text.startswith(said) else str(tokenizer.decode([token]))
        said = text
        found.append(Piece(new, tuple(waiting), strand.learnt[number], roles[number]))
        waiting = []
    return found


def runs_of(pieces: Sequence[Piece]) -> list[tuple[bool, str, list[Piece]]]:
    """Neighbouring pieces of the same role that are both learnt or both not."""
    return [
        (learnt, role, list(group))
        for (learnt, role), group in groupby(pieces, key=lambda piece: (piece.learnt, piece.role))
    ]
