"""Pieces end to end are the text; stop texts are found across pieces and never shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from lorakit.serve.detokenize import Detokenizer, StopTexts
from tests.serve.tiny_serving import EOS, byte_tokenizer

BYTES = byte_tokenizer()


def pieces(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], prompt: list[int] | None = None
) -> list[str]:
    text = Detokenizer(tokenizer, prompt or [])
    return [*(text.add(token) for token in tokens), text.flush()]


def of(text: str) -> list[int]:
    return BYTES(text)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, EOS), max_size=120), st.lists(st.integers(0, EOS), max_size=9))
def test_pieces_of_any_tokens_are_the_decoded_text(tokens: list[int], prompt: list[int]) -> None:
    assert "".join(pieces(BYTES, tokens, prompt)) == BYTES.decode(tokens, skip_special_tokens=True)


UNFINISHED = [token for token in range(256) if BYTES.decode([token]) == "\N{REPLACEMENT CHARACTER}"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(UNFINISHED), min_size=60, max_size=300))
def test_bytes_that_are_hardly_ever_text(tokens: list[int]) -> None:
    said = pieces(BYTES, tokens)
    assert "".join(said) == BYTES.decode(tokens)
    assert all(len(piece) <= 8 for piece in said)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_a_character_is_said_whole(text: str) -> None:
    said = pieces(BYTES, of(text))
    assert "".join(said) == text
    assert not any(
        "\N{REPLACEMENT CHARACTER}" in piece for piece in said if "\N{REPLACEMENT CHARACTER}" not in text
    )


def test_bytes_are_held_back_until_the_character_is_complete() -> None:
    assert pieces(BYTES, of("aß€")) == ["a", "", "ß", "", "", "€", ""]


def test_an_incomplete_end_is_said_at_last() -> None:
    assert pieces(BYTES, of("€")[:2]) == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_not_text() -> None:
    assert pieces(BYTES, [*of("a"), EOS, *of("b")]) == ["a", "", "b", ""]


def spaces() -> PreTrainedTokenizerFast:
    """Words that carry their space in front, as in sentencepiece: the first of a text loses it."""
    vocabulary = {
        token: i
        for i, token in enumerate(["<unk>", "▁Once", "▁upon", "▁a", "s", "<0xE2>", "<0x82>", "<0xAC>"])
    }
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(st.lists(st.integers(1, 4), max_size=12), st.lists(st.integers(1, 4), max_size=12))
def test_a_space_in_front_is_kept_where_the_prompt_goes_on(prompt: list[int], tokens: list[int]) -> None:
    tokenizer = spaces()
    whole = tokenizer.decode([*prompt, *tokens])
    assert tokenizer.decode(prompt) + "".join(pieces(tokenizer, tokens, prompt)) == whole


def test_a_continued_text_has_its_space() -> None:
    assert "".join(pieces(spaces(), [2, 3], [1])) == " upon a"
    assert "".join(pieces(spaces(), [2, 3])) == "upon a"


def test_bytes_of_sentencepiece() -> None:
    assert pieces(spaces(), [5, 6, 7, 3], [1]) == ["", "", "€", " a", ""]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_end_the_text_where_the_first_one_begins(parts: list[str], stops: list[str]) -> None:
    search, shown, matched = StopTexts(stops), "", None
    for part in parts:
        piece, matched = search.add(part)
        shown += piece
        if matched is not None:
            break
    else:
        shown += search.flush()
    text = "".join(parts)
    # The earliest end of a stop text decides, and of those that are complete with the same piece the first beginning.
    assert (matched is None) == (not any(stop in text for stop in stops))
    assert text.startswith(shown)
    if matched is None:
        assert shown == text
    else:
        assert text[len(shown) :].startswith(matched)
        assert not any(stop in shown for stop in stops)


def test_what_could_become_a_stop_text_is_held_back() -> None:
    search = StopTexts(["END"])
    assert search.add("the E") == ("the ", None)
    assert search.add("N") == ("", None)
    assert search.add("T") == ("ENT", None)
    assert search.add("xEND") == ("x", "END")


@pytest.mark.parametrize("stops", [["ab", "b"], ["b", "ab"]])
def test_the_first_beginning_wins(stops: list[str]) -> None:
    assert StopTexts(stops).add("xxab") == ("xx", "ab")
