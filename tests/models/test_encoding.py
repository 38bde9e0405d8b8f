"""Many texts to token ids: what a tokenizer is asked, and that portions change nothing."""

from __future__ import annotations

from typing import Any

from lorakit.models.encoding import encode_ids


def test_only_what_every_tokenizer_takes_is_asked() -> None:
    """MistralCommonBackend of transformers refuses all arguments but these."""

    class Sparing:
        def __call__(
            self,
            text: list[str] | None = None,
            text_target: list[str] | None = None,
            add_special_tokens: bool = True,
            return_attention_mask: bool | None = None,
            verbose: bool = True,
        ) -> dict[str, Any]:
            return {"input_ids": [[len(word) for word in each.split()] for each in text or text_target or ()]}

    tokenizer: Any = Sparing()
    assert encode_ids(tokenizer, ["a bc", "def"]) == [[1, 2], [3]]
    assert encode_ids(tokenizer, ["a bc"] * 3000, target=True) == [[1, 2]] * 3000
