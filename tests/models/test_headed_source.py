"""A body's checkpoint under the names of a model with a head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartModel

from lorakit.errors import MergeError
from lorakit.models.headed_source import HeadedSource, change_config, name_labels
from lorakit.models.merge_source import merge_source
from lorakit.plan.architectures import architecture
from tests.tiny_chat import save_tiny_chat
from tests.tiny_encoder import save_tiny_encoder


def headed(folder: Path, labels: tuple[str, ...] = ("a", "b", "c")) -> HeadedSource:
    source = merge_source(folder)
    name_labels(folder, labels, texts=True)
    model = architecture(folder, task="sequence-classification").model
    return HeadedSource(source, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooler", [True, False])
def test_of_an_encoder_the_head_is_new_and_the_pooler_where_it_lacks(tmp_path: Path, pooler: bool) -> None:
    folder = save_tiny_encoder(tmp_path / "base", pooler=pooler)
    bare = merge_source(folder)
    source = headed(folder)
    lacking = {} if pooler else {"bert.pooler.dense.bias": (32,), "bert.pooler.dense.weight": (32, 32)}
    assert source.new == {**lacking, "classifier.bias": (3,), "classifier.weight": (3, 32)}
    assert len(source) == len(bare) + len(source.new) == len(set(source))
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(source[f"bert.{name}"], bare[name])
    assert b"".join(map(bytes, source.pieces(f"bert.{name}"))) == b"".join(map(bytes, bare.pieces(name)))
    assert not source["classifier.weight"].any()
    assert source.file("classifier.weight") == "model.safetensors"
    assert source.dtype("classifier.weight") is torch.float32


def test_a_language_models_head_is_left_out_and_padding_becomes_known(tmp_path: Path) -> None:
    folder = save_tiny_chat(tmp_path / "base", tie_word_embeddings=False)
    change_config(folder, {"pad_token_id": None})
    assert "lm_head.weight" in merge_source(folder)
    source = headed(folder)
    assert "lm_head.weight" not in source
    assert set(source.new) == {"score.weight"}
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config["pad_token_id"], int)
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_one_label_is_a_number(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "base")
    change_config(folder, {"problem_type": "single_label_classification"})
    assert headed(folder, ("value",)).new["classifier.weight"] == (1, 32)
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"
    name_labels(folder, ("a", "b"), texts=False)
    assert "problem_type" not in json.loads((folder / "config.json").read_text())


def test_of_a_tie_the_checkpoint_need_hold_one(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=259, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, pad_token_id=1,
    )  # fmt: skip
    BartModel(config).save_pretrained(tmp_path / "bart")
    assert all(name.startswith("classification_head.") for name in headed(tmp_path / "bart").new)


def test_a_body_that_is_stored_under_other_names_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("encoder.layer.", "encoder.blocks."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"has no bert\.encoder\.layer\.0.*transformers makes it in loading"):
        headed(folder)


def test_zeros_are_never_written(tmp_path: Path) -> None:
    source = headed(save_tiny_encoder(tmp_path / "base"))
    source.check_brought(["classifier.weight", "classifier.bias", "more"], [1.0])
    with pytest.raises(MergeError, match=r"has no classifier\.bias, and the adapter does not bring it"):
        source.check_brought(["classifier.weight"], [1.0])
    with pytest.raises(MergeError, match="with weight 1"):
        source.check_brought(["classifier.weight", "classifier.bias"], [0.5])
