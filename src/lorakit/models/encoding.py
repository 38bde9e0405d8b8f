"""Many texts to token ids in few calls, which is quicker than a call for each; the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# A tokenizer makes far more of a text than its ids, all of which is in memory at once: about 100 bytes a character.
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 2**20


def encode_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True, target: bool = False
) -> list[list[int]]:
    """Token ids of texts.

    Args:
        tokenizer: The model's.
        texts: Any number of them.
        special: Whether the tokenizer adds the tokens that begin and end a text.
        target: Whether the texts are what an encoder-decoder writes.
    """
    found: list[list[int]] = []
    for some in portions(texts, [len(text) for text in texts]):
        encoded: Any = tokenizer(
            None if target else list(some),
            text_target=list(some) if target else None,
            add_special_tokens=special,
            return_attention_mask=False,
            verbose=False,
        )
        found += encoded["input_ids"]
    return found


def portions(items: Sequence[T], characters: Sequence[int]) -> Iterator[Sequence[T]]:
    """Items in their order, so many at a time as a tokenizer should have at once.

    Args:
        items: Texts, or what has some.
        characters: The length of each.
    """
    start = total = 0
    for number, length in enumerate(characters):
        if number > start and (number - start >= _ROWS_AT_ONCE or total + length > _CHARACTERS_AT_ONCE):
            yield items[start:number]
            start, total = number, 0
        total += length
    if start < len(items):
        yield items[start:]
