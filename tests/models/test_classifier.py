"""Classifiers: a fresh head over any body, reproducible, and the checkpoint's own where it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lorakit.errors import ModelError
from lorakit.models import head_of, labels_of, load_classifier
from tests.tiny_chat import save_tiny_chat

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
LABELS = ("no", "perhaps", "yes")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its pooler."""
    folder = tmp_path_factory.mktemp("bert")
    hf.BertModel(hf.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_pooler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_labels_are_in_the_configuration_and_the_head_is_named(bert: Path) -> None:
    made = load_classifier(bert, LABELS)
    assert made.labels == labels_of(made.model) == LABELS
    assert made.model.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert made.model.config.num_labels == 3
    assert (made.head, made.fresh) == (("classifier",), True)
    assert not made.model.training


def test_a_new_pooler_is_part_of_the_head(without_pooler: Path) -> None:
    assert load_classifier(without_pooler, LABELS).head == ("classifier", "bert.pooler.dense")


def test_a_decoder_has_a_score(tmp_path: Path) -> None:
    made = load_classifier(save_tiny_chat(tmp_path / "tiny"), LABELS)
    assert made.head == ("score",)
    assert made.model.config.pad_token_id == 2


def test_roberta_has_a_head_of_two_layers(tmp_path: Path) -> None:
    hf.RobertaModel(hf.RobertaConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    made = load_classifier(tmp_path, LABELS)
    assert made.head == ("classifier",)
    assert {name for name, _ in made.model.classifier.named_parameters()} >= {"dense.weight", "out_proj.bias"}


def values(made: Any) -> torch.Tensor:
    return made.model.classifier.weight.detach().clone()


def test_the_seed_decides_the_head_and_torchs_own_state_is_left_alone(bert: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = load_classifier(bert, LABELS, seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert torch.equal(values(one), values(load_classifier(bert, LABELS, seed=1)))
    assert not torch.equal(values(one), values(load_classifier(bert, LABELS, seed=2)))


def test_a_checkpoint_keeps_its_head_for_the_same_labels_only(bert: Path, tmp_path: Path) -> None:
    first = load_classifier(bert, LABELS, seed=3)
    first.model.save_pretrained(tmp_path)
    again = load_classifier(tmp_path, LABELS, seed=4)
    assert not again.fresh
    assert torch.equal(values(first), values(again))
    assert load_classifier(tmp_path).labels == LABELS
    other = load_classifier(tmp_path, ("a", "b", "c"), seed=4)
    assert other.fresh
    assert labels_of(other.model) == ("a", "b", "c")
    assert not torch.equal(values(other), values(again))
    assert torch.equal(values(other), values(load_classifier(tmp_path, ("a", "b", "c"), seed=4)))
    assert torch.count_nonzero(other.model.classifier.bias) == 0
    two = load_classifier(tmp_path, ("a", "b"))
    assert two.fresh
    assert values(two).shape == (2, 16)
    body = "encoder.layer.0.attention.self.query.weight"
    for model in (again.model, other.model, two.model):
        assert torch.equal(model.bert.get_parameter(body), first.model.bert.get_parameter(body))


def test_a_model_without_a_head_cannot_be_taken_as_it_is(bert: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no classification head of its own: classifier\.bias, classifier\.weight"
    ):
        load_classifier(bert)


def test_a_class_without_a_head_says_so(bert: Path) -> None:
    with pytest.raises(ModelError, match="BertModel has no classification head"):
        head_of(hf.BertModel.from_pretrained(bert))


@pytest.mark.model
def test_minilm_has_its_own_pooler() -> None:
    made = load_classifier("minilm", [str(i) for i in range(6)])
    assert made.head == ("classifier",)
    assert sum(p.numel() for p in made.model.classifier.parameters()) == 6 * 384 + 6
