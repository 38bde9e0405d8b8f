"""Which runner a base gets, and what int8 costs."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit.errors import ConfigError, ModelError
from lorakit.ops.native.decoder import Kernel, kernel
from lorakit.serve.native_runner import NativeRunner
from lorakit.serve.runners import make_runner, rounding_cost
from lorakit.serve.transformers_runner import TransformersRunner

compiled = pytest.mark.skipif(not isinstance(kernel(), Kernel), reason="the compiled step is not built")


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=256)
    ).eval()  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)).eval()


class Letters:
    def __call__(self, text, return_tensors):
        return type("Encoded", (), {"input_ids": torch.tensor([[ord(c) % 300 for c in text[:200]]])})


@compiled
def test_the_compiled_one_is_taken_where_it_can_be():
    runner, told = make_runner(llama(), threads=1)
    assert isinstance(runner, NativeRunner)
    assert "compiled step, 1 threads" in told


def test_the_other_one_is_taken_where_it_cannot_and_says_why():
    runner, told = make_runner(gpt2())
    assert isinstance(runner, TransformersRunner)
    assert "transformers' own layers (The compiled engine" in told


def test_it_can_be_insisted_on_either():
    assert isinstance(make_runner(llama(), kind="transformers")[0], TransformersRunner)
    with pytest.raises((ModelError, Exception), match="compiled engine"):
        make_runner(gpt2(), kind="native")


def test_int8_needs_the_compiled_one():
    with pytest.raises(ConfigError, match="Only the compiled runner"):
        make_runner(llama(), kind="transformers", weights="int8")


@compiled
def test_int8_says_what_it_costs():
    runner, told = make_runner(llama(), Letters(), weights="int8")
    assert runner.storage == "int8"
    assert "on 200 tokens of plain text: perplexity" in told


@compiled
def test_the_cost_is_nothing_where_nothing_is_rounded():
    model = llama()
    tokens = torch.randint(300, (50,))
    with torch.inference_mode():
        own = model(input_ids=tokens[None]).logits[0]
    cost = rounding_cost(NativeRunner(copy.deepcopy(model)), tokens, own)
    assert cost.tokens == 50
    assert cost.agreement == 1
    assert cost.divergence < 1e-6
    assert cost.perplexity == pytest.approx(cost.rounded_perplexity, rel=1e-5)
    other = rounding_cost(NativeRunner(model), tokens, torch.randn(50, 300))
    assert other.divergence > 0.1
    assert other.agreement < 0.5
