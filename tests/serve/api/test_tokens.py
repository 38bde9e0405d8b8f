"""Tokens one by one: joined, their bytes are the text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lorakit.serve.api.tokens import TokenTexts
from tests.tiny_chat import tiny_tokenizer


def test_bytes_of_a_byte_level_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    word = "né🙂 \n\t~\x00\xad"
    ids = tokenizer(word)["input_ids"]
    assert b"".join(texts.one(i).bytes for i in ids) == word.encode()
    assert texts.one(ids[0]) == ("n", b"n")
    assert texts.one(ids[1]).text == "\ufffd"
    assert texts.one(ids[1]).key == "bytes:\\xc3"
    assert len({texts.one(i).key for i in range(3, 259)}) == 256


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert texts.one(1) == ("a", b"a")
    assert texts.one(2 + 0xE2).bytes == b"\xe2"
