"""Blocks and the presets of bottleneck adapters, on the architectures that the table names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError
from lorakit.targets.blocks import FAMILIES, BlockTarget, _is_of

D, INNER = 32, 20
PLAIN = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": INNER,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIR = {
    "d_model": D,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OPT = {"word_embed_proj_dim": D, "ffn_dim": INNER, **PLAIN}
T5 = {"d_model": D, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": INNER, "decoder_start_token_id": 0}
GPT2 = {"n_embd": D, "n_head": 4, "n_layer": 2}
BERT = "encoder.layer.0"
ALBERT = "encoder.albert_layer_groups.0.albert_layers.0"
T5_LAYER = "encoder.block.0.layer"
CASES: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    # architecture, configuration, the first layer's attention output, its feed-forward output, its block
    "bert": ("Bert", PLAIN, f"{BERT}.attention.output.dense", f"{BERT}.output.dense", f"{BERT}[ffn]"),
    "roberta": ("Roberta", PLAIN, f"{BERT}.attention.output.dense", f"{BERT}.output.dense", f"{BERT}[ffn]"),
    "mpnet": ("MPNet", PLAIN, f"{BERT}.attention.attn.o", f"{BERT}.output.dense", f"{BERT}[ffn]"),
    "distilbert": (
        "DistilBert", {"dim": D, "n_heads": 4, "n_layers": 2, "hidden_dim": INNER},
        "transformer.layer.0.attention.out_lin", "transformer.layer.0.ffn.lin2", "transformer.layer.0.ffn",
    ),
    "albert": (
        "Albert", {"embedding_size": 16, **PLAIN},
        f"{ALBERT}.attention.dense", f"{ALBERT}.ffn_output", f"{ALBERT}[ffn]",
    ),
    "modernbert": (
        "ModernBert", {"cls_token_id": 1, "sep_token_id": 2, **PLAIN},
        "layers.0.attn.Wo", "layers.0.mlp.Wo", "layers.0.mlp",
    ),
    "llama": ("Llama", PLAIN, "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.0.mlp"),
    "phi3": (
        "Phi3", {"num_key_value_heads": 2, **PLAIN},
        "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.0.mlp",
    ),
    "phi": ("Phi", PLAIN, "layers.0.self_attn.dense", "layers.0.mlp.fc2", "layers.0.mlp"),
    "gpt2": ("GPT2", GPT2, "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp"),
    "gptj": ("GPTJ", {"rotary_dim": 4, **GPT2}, "h.0.attn.out_proj", "h.0.mlp.fc_out", "h.0.mlp"),
    "opt": ("OPT", OPT, "decoder.layers.0.self_attn.out_proj", "decoder.layers.0.fc2", "decoder.layers.0[ffn]"),
    "bart": ("Bart", PAIR, "encoder.layers.0.self_attn.out_proj", "encoder.layers.0.fc2", "encoder.layers.0[ffn]"),
    "t5": (
        "T5", T5, f"{T5_LAYER}.0.SelfAttention.o", f"{T5_LAYER}.1.DenseReluDense.wo", f"{T5_LAYER}.1.DenseReluDense",
    ),
    "neox": ("GPTNeoX", PLAIN, "layers.0.attention.dense", "layers.0.mlp.dense_4h_to_h", "layers.0.mlp"),
    "bloom": (
        "Bloom", {"hidden_size": D, "n_head": 4, "n_layer": 2},
        "h.0.self_attention.dense", "h.0.mlp.dense_4h_to_h", "h.0.mlp",
    ),
    "falcon": ("Falcon", PLAIN, "h.0.self_attention.dense", "h.0.mlp.dense_4h_to_h", "h.0.mlp"),
    "mpt": (
        "Mpt", {"d_model": D, "n_heads": 4, "n_layers": 2},
        "blocks.0.attn.out_proj", "blocks.0.ffn.down_proj", "blocks.0.ffn",
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def build(case: str) -> nn.Module:
    kind, options, *_ = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(vocab_size=11, **options)
    return transformers.AutoModel.from_config(config).eval()


def output(model: nn.Module) -> Tensor:
    ids = torch.tensor([[3, 1, 4, 5, 9], [2, 6, 5, 3, 5]])
    pair = model.config.is_encoder_decoder  # type: ignore[union-attr]
    return model(ids, decoder_input_ids=ids)[0] if pair else model(ids)[0]  # type: ignore[no-any-return]


@cases
def test_the_presets_name_the_places_of_the_papers(case: str) -> None:
    model, (_, _, attention, feed_forward, block) = build(case), CASES[case]
    both = [t.path for t in lk.find(model, "all-block-outputs", adapts="module")]
    after = [t.path for t in lk.find(model, "all-ffn-outputs", adapts="module")]
    blocks = lk.find(model, "all-ffn", adapts="module")
    assert both[:2] == [attention, feed_forward]
    assert after[0] == feed_forward
    assert set(after) < set(both)
    assert blocks[0].path == block
    assert len(blocks) == len(after)
    assert {(t.in_, t.out) for t in blocks} == {(D, D)}


@cases
@pytest.mark.parametrize(
    "method", [lk.Houlsby(size=4), lk.Pfeiffer(reduction=8), lk.ParallelAdapter(size=4)], ids=lambda m: m.name
)
def test_every_adapter_runs_and_trains(case: str, method: Any) -> None:
    model = build(case)
    with torch.no_grad():
        base = output(model)
    lk.attach(model, method, seed=0)
    with torch.no_grad():
        y = output(model)
    assert torch.equal(y, base) == (method.name == "parallel")
    torch.testing.assert_close(y, base, rtol=0, atol=0.05)  # near the identity, all of them
    assert lk.report(model).never_ran == ()
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    y = output(model)
    assert not torch.allclose(y, base, atol=1e-3)
    y.square().sum().backward()
    grads = [p.grad for p in lk.trainable(model).values()]
    assert all(g is not None for g in grads)
    if case != "opt":  # lays the tokens of all rows end to end, so that they cannot be told apart
        with torch.no_grad(), lk.use(model, rows=["default", None]):
            mixed = output(model)
        torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[0], y[0].detach(), rtol=1e-4, atol=1e-5)
    state = lk.extract(model)
    lk.detach(model)
    with torch.no_grad():
        assert torch.equal(output(model), base)
    lk.attach(model, state)
    torch.testing.assert_close(output(model), y.detach())


def test_every_family_of_the_table_is_met() -> None:
    layers = [module for case in CASES for module in build(case).modules()]
    assert all(any(_is_of(layer, family) for layer in layers) for family in FAMILIES)


def test_the_feed_forward_of_bert_with_a_parallel_adapter() -> None:
    """By hand, with BERT's own modules: beside the feed-forward, before the residual and the norm."""
    model = build("bert").double()
    lk.attach(model, lk.ParallelAdapter(size=3), targets=["encoder.layer.1[ffn]"])
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_(generator=torch.Generator().manual_seed(0))
    layer = model.encoder.layer[1]  # type: ignore[union-attr, index]
    p = lk.extract(model).tensors["encoder.layer.1[ffn]"]
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        inner = layer.intermediate.intermediate_act_fn(
            nn.functional.linear(x, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        )
        y = nn.functional.linear(inner, layer.output.dense.weight, layer.output.dense.bias)
        beside = 4 * (torch.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
        expected = layer.output.LayerNorm(x + y + beside)
        torch.testing.assert_close(layer.output(layer.intermediate(x), x), expected)


class Layer(nn.Module):
    """Feed-forward inline, and things that are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm, self.names = nn.LayerNorm(4), nn.ModuleList([nn.Linear(4, 4)])
        self.attn = nn.MultiheadAttention(4, 2)
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def host() -> nn.ModuleDict:
    return nn.ModuleDict({"layer": Layer()})


def test_what_a_block_is() -> None:
    (span,) = lk.find(host(), ["layer[fc1:fc2]"], adapts="module")
    (named,) = lk.find(host(), ["layer[ffn]"], adapts="module")
    for target in (span, named):
        assert isinstance(target, BlockTarget)
        assert (target.in_, target.out, target.shape.kind) == (4, 4, "module")
    (linear,) = lk.find(host(), ["fc1"], adapts="module")
    assert linear.shape.kind == "linear"
    (rows,) = lk.find(host(), ["fc1[0:3]"], adapts="module")
    assert (rows.path, rows.out) == ("layer.fc1[0:3]", 3)
    chosen = lk.find(host(), lambda path, module: isinstance(module, Layer), adapts="module")
    assert [t.path for t in chosen] == ["layer"]
    assert [t.path for t in lk.find(host(), "layer", adapts="module", exclude=None)] == ["layer"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["norm"], "LayerNorm has no linear layer"),
        (["conv"], "maps vectors to vectors, which a convolution does not"),
        (["names"], "ModuleList is never called"),
        (["attn.out_proj"], "never calls it"),
        (["layer[fc1]"], r"first and a last module in it, as in \[fc1:fc2\]; it has: fc1"),
        (["layer[fc1:fc3]"], "first and a last module"),
        (["attn[ffn]"], "feed-forward is not known here"),
    ],
    ids=str,
)
def test_what_is_no_block_says_why(targets: list[str], message: str) -> None:
    with pytest.raises(UnsupportedTargetError, match=message):
        lk.find(host(), targets, adapts="module")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all-ffn", "no transformer layer of a known architecture in ModuleDict.*fc2.*Name the layers"),
        (
            "all-linear",
            "'all-linear' chooses layers or parameters, which this method does not adapt: .*'all-ffn'",
        ),
        ("fc1", r"give a list: \['fc1'\]"),
        (["fc7"], "module 'fc7' matches nothing.*Did you mean 'fc2' or 'fc1'"),
        (lambda path, module: False, "chose none"),
    ],
    ids=["preset", "other preset", "string", "typo", "callable"],
)
def test_what_is_not_found_says_what_there_is(targets: Any, message: str) -> None:
    with pytest.raises(UnmatchedTargetError, match=message):
        lk.find(host(), targets, adapts="module")


def test_the_presets_of_blocks_are_for_methods_of_blocks() -> None:
    with pytest.raises(UnmatchedTargetError, match="chooses each block, which this method does not adapt"):
        lk.attach(host(), lk.LoRA(), targets="all-ffn")
