"""The template beside an adapter: written, found again, and refused where it or the tokenizer has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorakit.errors import AdapterFileError, AdapterMismatchError, ConfigError
from lorakit.models.chat_template import (
    adapter_template,
    adopt_common_template,
    adopt_template,
    carry_template,
    read_template,
    save_template,
    template_text,
)
from tests.tiny_chat import TEMPLATE, tiny_tokenizer

OTHER = TEMPLATE.replace("\n", " ")


def saved(folder: Path, template: str | None = TEMPLATE) -> Path:
    folder.mkdir(exist_ok=True)
    save_template(folder, tiny_tokenizer(template))
    return folder


def test_the_template_is_found_again_byte_for_byte(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", TEMPLATE + "{# é\r\n #}")
    assert adapter_template(folder, tiny_tokenizer(OTHER)) == TEMPLATE + "{# é\r\n #}"
    record = json.loads((folder / "rendering.json").read_text(encoding="utf-8"))
    assert (record["stop_id"], record["stop_token"]) == (2, "<|im_end|>")


def test_the_tokenizer_adopts_the_adapters_template(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    same, other = tiny_tokenizer(), tiny_tokenizer(OTHER)
    assert not adopt_template(folder, same)
    assert adopt_template(folder, other)
    assert other.chat_template == TEMPLATE
    plain = saved(tmp_path / "plain", None)
    assert not (plain / "chat_template.jinja").exists()
    assert adopt_template(plain, other)
    assert template_text(other) is None


def test_an_adapter_without_a_record_takes_the_tokenizers(tmp_path: Path) -> None:
    assert adapter_template(tmp_path, tiny_tokenizer(OTHER)) == OTHER
    assert adapter_template(tmp_path / "file.safetensors", tiny_tokenizer(None)) is None


def test_a_template_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "chat_template.jinja").write_text(OTHER, encoding="utf-8")
    with pytest.raises(AdapterFileError, match="not the template that the adapter was trained with"):
        adapter_template(folder, tiny_tokenizer())
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(AdapterFileError, match="not the template"):
        adapter_template(folder, tiny_tokenizer())
    saved(folder, None)  # another training into the same folder
    assert adapter_template(folder, tiny_tokenizer()) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path / "a")
    (folder / "rendering.json").write_text(content, encoding="utf-8")
    with pytest.raises(AdapterFileError, match=r"rendering\.json"):
        adapter_template(folder, tiny_tokenizer())


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<u>": 0, "<e>": 1}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<u>", eos_token="<e>", chat_template=TEMPLATE
    )
    with pytest.raises(AdapterMismatchError, match="trained with another tokenizer"):
        adapter_template(saved(tmp_path / "a"), other)


def test_several_adapters_need_one_template(tmp_path: Path) -> None:
    one, two, none = saved(tmp_path / "one"), saved(tmp_path / "two"), tmp_path / "none"
    none.mkdir()
    assert adopt_common_template([one, two], tiny_tokenizer(OTHER))
    merged = tmp_path / "merged"
    merged.mkdir()
    carry_template([one, none, two], merged)
    assert (merged / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    saved(two, OTHER)
    with pytest.raises(ConfigError, match="trained with different chat templates"):
        adopt_common_template([one, two], tiny_tokenizer())
    with pytest.raises(ConfigError, match="trained with different chat templates"):
        carry_template([one, two], merged)


def test_templates_from_files(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    assert read_template(path) == TEMPLATE
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        read_template(path)
    with pytest.raises(ConfigError, match="no chat template"):
        read_template(tmp_path / "other.jinja")
