"""Tokens to text, piece by piece: whole characters only, nothing of a stop text, the same text as decoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens before the first: whether a piece starts with a space depends on what it follows
_MOST_BYTES = 4  # of one character
_LONGEST = 64


class Detokenizer:
    """The text of one answer, token by token.

    All pieces end to end are what the tokens add to the decoded prompt, without special tokens. Bytes of a character
    that is not complete yet are held back; bytes that never become one come out as U+FFFD, like the decoder's.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        """Start an answer.

        Args:
            tokenizer: Of transformers.
            prompt: What stands before the answer.
        """
        self._decode = tokenizer.decode
        self._tokens = list(prompt[-_CONTEXT:])
        if self._text().endswith(
            _UNFINISHED
        ):  # the prompt ends inside a character: the answer does not begin there
            self._tokens = []
        self._said = len(
            self._text()
        )  # of the text of `_tokens`, how much was said (or belongs to the prompt)
        self._since = len(self._tokens)  # from here on no token has been said whole

    def add(self, token_id: int) -> str:
        """The text that this token makes certain."""
        self._tokens.append(token_id)
        text = self._text()
        if text.endswith(_UNFINISHED):
            if len(self._tokens) - self._since <= _MOST_BYTES:
                return ""
            # More tokens than a character has bytes: only the last ones can still become something else.
            certain = text.rstrip(_UNFINISHED)
            piece = self._say(text[: max(len(certain), len(text) - _MOST_BYTES)])
            if len(self._tokens) > _LONGEST:  # bytes that are no text at all: decode the last of them only
                unsaid = len(text) - self._said
                self._tokens = self._tokens[-_LONGEST // 4 :]
                self._said, self._since = len(self._text()) - unsaid, 0
            return piece
        piece = self._say(text)
        # Go on from here, with the last tokens as context.
        self._tokens = self._tokens[self._since :][-_CONTEXT:]
        self._said, self._since = len(self._text()), len(self._tokens)
        return piece

    def flush(self) -> str:
        """What was held back, complete or not: the answer is over."""
        return self._say(self._text())

    def _text(self) -> str:
        return str(self._decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _say(self, text: str) -> str:
        piece = text[self._said :]
        self._said = max(self._said, len(text))
        return piece


class Stopped(NamedTuple):
    """A piece of text that may be shown, and the stop text that was met right after it, if one was."""

    text: str
    matched: str | None


class StopTexts:
    """Looks for stop texts in an answer, also across its pieces, and holds back what could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def add(self, piece: str) -> Stopped:
        """What may be shown of the text so far, now that ``piece`` has come."""
        if not self._stops:
            return Stopped(piece, None)
        text = self._held + piece
        places = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            at, stop = min(places, key=lambda place: (place[0], -len(place[1])))
            self._held = ""
            return Stopped(text[:at], stop)
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return Stopped(text[: len(text) - keep], None)

    def flush(self) -> str:
        """What was held back, as the answer is over."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How much of the end of ``text`` is a beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
