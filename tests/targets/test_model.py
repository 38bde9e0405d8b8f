"""A model's input: where it is, whatever is around the backbone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import lorakit as lk
from lorakit.targets.model import ModelTarget, inputs, model_target
from tests.attach.architectures import t5
from tests.attach.readers import READERS, reader


class Wrapped(nn.Module):
    """A model of the user's own around a transformer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(16, 2)


@pytest.mark.parametrize("name", READERS)
def test_it_is_the_innermost_module_that_takes_the_tokens(name: str) -> None:
    model = reader(name)
    for around in (model, model.base_model, Wrapped(model)):
        target = inputs(around)[""]
        assert isinstance(target, ModelTarget)
        assert target.module is model.base_model
        assert target.embedding is model.get_input_embeddings()
        assert target.shape.out == 16
        assert torch.equal(target.weight(), model.get_input_embeddings().weight.mT)
    assert inputs(model)[""].pools_first == (name in ("bert", "roberta"))  # type: ignore[union-attr]
    assert [t.path for t in lk.find(model, "all-inputs", adapts="model")] == [""]


def test_a_model_with_two_readers_has_each_under_its_path() -> None:
    both = nn.ModuleDict({"question": reader("bert"), "answer": reader("roberta")})
    assert list(inputs(both)) == ["question.bert", "answer.roberta"]
    target = model_target(both, "answer.roberta")
    assert isinstance(target, ModelTarget)
    assert target.module is both["answer"].roberta
    assert model_target(both, "") is None


def test_why_others_are_not() -> None:
    reason = inputs(t5())
    assert all("encoder-decoder" in str(r) for r in reason.values())
    assert inputs(nn.Linear(2, 2)) == {}
    lost = hf.BertModel(
        hf.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    lost.embeddings.word_embeddings = nn.EmbeddingBag(20, 16)
    assert "input embedding" in str(inputs(lost)[""])
