"""Prompt tuning: count, starts, and what is refused."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from tests.attach.architectures import t5
from tests.attach.readers import READERS, reader


def start(name: str, method: lk.PromptTuning, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The fresh prompt, and the table of the model's tokens."""
    model = reader(name)
    table = model.get_input_embeddings().weight.detach().clone()
    lk.attach(model, method, seed=seed)
    return lk.extract(model).tensors[""]["prompt"], table


@pytest.mark.parametrize("name", READERS)
def test_it_has_p_times_d_numbers(name: str) -> None:
    report = lk.attach(reader(name), lk.PromptTuning(length=9))
    assert report.parameters == report.trainable == 9 * 16
    assert [(site.path, site.kind) for site in report.sites] == [("", "model")]


def test_it_starts_from_tokens_of_the_vocabulary() -> None:
    prompt, table = start("llama", lk.PromptTuning(length=30))
    places = [int((table == row).all(dim=1).nonzero()[0]) for row in prompt]
    assert len(set(places)) > 10
    again, _ = start("llama", lk.PromptTuning(length=30))
    other, _ = start("llama", lk.PromptTuning(length=30), seed=1)
    assert torch.equal(again, prompt)
    assert not torch.equal(other, prompt)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_it_starts_from_a_text_repeated_or_cut(length: int) -> None:
    prompt, table = start("gpt2", lk.PromptTuning(length=length, init_ids=(5, 9, 4)))
    assert torch.equal(prompt, table[torch.tensor([5, 9, 4, 5, 9, 4, 5])[:length]])


def test_random_starts_have_the_spread_they_are_called_by() -> None:
    uniform, _ = start("llama", lk.PromptTuning(length=400, init="uniform"))
    assert 0.49 < uniform.abs().max() <= 0.5
    assert abs(uniform.mean()) < 0.02
    normal, _ = start("llama", lk.PromptTuning(length=400, init="normal"))
    assert abs(normal.std() - 1) < 0.05


def test_a_scaled_embedding_gives_its_scaled_vectors() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.Gemma3ForCausalLM(config).eval()
    lk.attach(model, lk.PromptTuning(length=2, init_ids=(3, 7)))
    expected = model.get_input_embeddings()(torch.tensor([3, 7]))
    torch.testing.assert_close(lk.extract(model).tensors[""]["prompt"], expected.detach())
    ids = torch.tensor([[5, 9, 4]])
    with torch.no_grad():
        longer = model(input_ids=torch.cat([torch.tensor([[3, 7]]), ids], dim=1)).logits[:, 2:]
        with_prompt = model(input_ids=ids).logits
        lk.detach(model)
        expected = model(input_ids=torch.cat([torch.tensor([[3, 7]]), ids], dim=1)).logits[:, 2:]
    torch.testing.assert_close(with_prompt, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(longer, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be a whole number of at least 1"),
        ({"init": "text"}, "No init of a prompt is called 'text'"),
        ({"pooled": "first"}, "Known: .'token', 'prompt'"),
        ({"init_ids": ("a",)}, "token ids, whole numbers"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.PromptTuning(**settings)  # type: ignore[arg-type]


def test_what_it_cannot_adapt_says_why() -> None:
    with pytest.raises(UnsupportedTargetError, match="encoder-decoder"):
        lk.attach(t5(), lk.PromptTuning())
    with pytest.raises(UnmatchedTargetError, match="has no model input that lorakit knows"):
        lk.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), lk.PromptTuning())
    with pytest.raises(UnsupportedTargetError, match="init_ids has the token 50, and there are 50"):
        lk.attach(reader("llama"), lk.PromptTuning(init_ids=(3, 50)))
    with pytest.raises(UnmatchedTargetError, match="it adapts 'all-inputs'"):
        lk.attach(reader("llama"), lk.PromptTuning(), "all-attention")
