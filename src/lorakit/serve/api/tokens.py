"""Tokens one by one, as log-probabilities tell them: a text for people and the bytes behind it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText(NamedTuple):
    """One token.

    Attributes:
        text: As a text; where its bytes are no text alone, the replacement character.
        bytes: Its bytes, so that those of neighbours can be joined to a text.
    """

    text: str
    bytes: bytes

    @property
    def key(self) -> str:
        r"""A name that no other token has; those that are no text are written as OpenAI does: ``bytes:\xe2``."""
        if "\N{REPLACEMENT CHARACTER}" not in self.text:
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


class TokenTexts:
    """The tokens of a tokenizer as texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.one = lru_cache(maxsize=65_536)(self._one)

    def _one(self, token_id: int) -> TokenText:
        text = str(self._tokenizer.decode([token_id]))
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return TokenText(text, text.encode("utf-8"))
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return TokenText(text, _bytes_of(str(name)) or text.encode("utf-8"))


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token that is part of a character, by the two ways in which vocabularies write such."""
    if found := _BYTE.fullmatch(name):
        return bytes.fromhex(found[1])
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else None


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
