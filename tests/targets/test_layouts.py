"""The parts of fused projections, held against what the real attention modules do with their outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.walk import base_modules
from lorakit.errors import UnsupportedTargetError
from lorakit.targets.layouts import LAYOUTS, parts_of
from lorakit.targets.recognise import layer_target

D, HEADS, TOKENS = 32, 4, 5
HEAD = D // HEADS


class Family(NamedTuple):
    """One architecture.

    Attributes:
        config: Of a tiny model.
        layer: The fused layer's name.
        rows: The rows of q, k and v as somebody reads them off the architecture's paper or code.
    """

    config: Callable[[], Any]
    layer: str
    rows: Callable[[], dict[str, list[int]]]


def blocks(**sizes: int) -> dict[str, list[int]]:
    """Parts one after another."""
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = list(range(start, start + size))
        start += size
    return found


def by_head() -> dict[str, list[int]]:
    """For each head: its q, its k, its v."""
    rows = torch.arange(3 * D).reshape(HEADS, 3, HEAD)
    return {name: rows[:, i].flatten().tolist() for i, name in enumerate("qkv")}


def falcon_groups() -> dict[str, list[int]]:
    """Two groups, each with two heads of q, one of k, one of v."""
    rows = torch.arange(2 * 4 * HEAD).reshape(2, 4, HEAD)
    return {
        "q": rows[:, :2].flatten().tolist(),
        "k": rows[:, 2].flatten().tolist(),
        "v": rows[:, 3].flatten().tolist(),
    }


def thirds() -> dict[str, list[int]]:
    return blocks(q=D, k=D, v=D)


def tiny(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind + "Config")(vocab_size=11, **options)


GPT2 = {"n_embd": D, "n_head": HEADS, "n_layer": 1, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
PLAIN = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {**PLAIN, "alibi": False, "bias": True}
FAMILIES = {
    "gpt2": Family(tiny("GPT2", **GPT2), "c_attn", thirds),
    "bigcode": Family(tiny("GPTBigCode", **GPT2), "c_attn", lambda: blocks(q=D, k=HEAD, v=HEAD)),
    "bigcode-heads": Family(tiny("GPTBigCode", multi_query=False, **GPT2), "c_attn", by_head),
    "phi3": Family(
        tiny("Phi3", num_key_value_heads=2, **PLAIN), "qkv_proj", lambda: blocks(q=D, k=2 * HEAD, v=2 * HEAD)
    ),
    "neox": Family(tiny("GPTNeoX", **PLAIN), "query_key_value", by_head),
    "bloom": Family(tiny("Bloom", hidden_size=D, n_head=HEADS, n_layer=1), "query_key_value", by_head),
    "persimmon": Family(tiny("Persimmon", qk_layernorm=False, **PLAIN), "query_key_value", by_head),
    "falcon-groups": Family(
        tiny("Falcon", new_decoder_architecture=True, num_kv_heads=2, **FALCON),
        "query_key_value",
        falcon_groups,
    ),
    "falcon-multi-query": Family(
        tiny("Falcon", multi_query=True, new_decoder_architecture=False, **FALCON),
        "query_key_value",
        lambda: blocks(q=D, k=HEAD, v=HEAD),
    ),
    "falcon-heads": Family(
        tiny("Falcon", multi_query=False, new_decoder_architecture=False, **FALCON),
        "query_key_value",
        by_head,
    ),
    "mpt": Family(tiny("Mpt", d_model=D, n_heads=HEADS, n_layers=1), "Wqkv", thirds),
    "modernbert": Family(tiny("ModernBert", cls_token_id=1, sep_token_id=2, **PLAIN), "Wqkv", thirds),
}
families = pytest.mark.parametrize("family", FAMILIES)
BIDIRECTIONAL = ("modernbert",)


def build(family: str) -> nn.Module:
    config = FAMILIES[family].config()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # small initial values would make the attention almost uniform
            p.normal_(std=0.4)
    return model


def fused(model: nn.Module, layer: str) -> tuple[str, nn.Module, nn.Module]:
    """Path of the fused layer, the layer, and the attention around it."""
    (path,) = [p for p, _ in base_modules(model) if p.endswith("." + layer)]
    return path, model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])


def attended(
    model: nn.Module, attention: nn.Module, change: Callable[[Tensor], Tensor], layer: str
) -> Tensor:
    """What the attention's output projection receives when the fused output is changed."""
    seen: list[Tensor] = []
    names = ("c_proj", "o_proj", "out_proj", "dense", "Wo")
    out = next(m for name in names if (m := getattr(attention, name, None)) is not None)
    hooks = [
        getattr(attention, layer).register_forward_hook(lambda m, a, y: change(y.clone())),
        out.register_forward_hook(lambda m, a, y: seen.append(a[0].detach())),
    ]
    with torch.no_grad():
        model(torch.tensor([[3, 1, 4, 5, 9]]))
    for hook in hooks:
        hook.remove()
    return seen[0]


@families
def test_the_rows_are_those_of_the_architecture(family: str) -> None:
    model, (_, layer, rows) = build(family), FAMILIES[family]
    path, _, _ = fused(model, layer)
    whole = layer_target(model, path)
    parts = parts_of(model, whole)  # type: ignore[arg-type]
    found = {name: torch.cat([torch.arange(a, b) for a, b in r.spans]).tolist() for name, r in parts.items()}
    assert found == rows()
    assert sorted(row for part in found.values() for row in part) == list(range(whole.out))  # type: ignore[union-attr]


@families
def test_the_attention_treats_the_parts_as_what_they_are_called(family: str) -> None:
    """What is averaged is v; q belongs to the token that asks, k to those that are asked."""
    model, (_, layer, _) = build(family), FAMILIES[family]
    _, _, attention = fused(model, layer)
    slices = {name: lk.find(model, [f"{layer}[{name}]"])[0] for name in "qkv"}
    base = attended(model, attention, lambda y: y, layer)

    def scaled(**factors: float) -> Tensor:
        def change(y: Tensor) -> Tensor:
            for name, factor in factors.items():
                y = slices[name].insert(y, slices[name].select(y) * factor)
            return y

        return attended(model, attention, change, layer)

    torch.testing.assert_close(scaled(v=2), 2 * base, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scaled(q=2, k=0.5), base, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(scaled(q=2), base)

    def at_one_token(name: str) -> Tensor:
        def change(y: Tensor) -> Tensor:
            flat = y.reshape(-1, y.shape[-1])
            flat[2] = slices[name].insert(flat[2], slices[name].select(flat[2]) * 3)
            return flat.reshape(y.shape)

        return (attended(model, attention, change, layer) - base).abs().amax(-1).flatten() > 1e-9

    every = [True] * TOKENS if family in BIDIRECTIONAL else [False, False, True, True, True]
    assert at_one_token("q").tolist() == [False, False, True, False, False]
    assert at_one_token("k").tolist() == every


@families
def test_an_adapter_of_q_is_a_change_of_those_rows_and_of_nothing_else(family: str) -> None:
    model, (_, layer, rows) = build(family), FAMILIES[family]
    by_hand = copy.deepcopy(model)
    ids = torch.tensor([[3, 1, 4, 5, 9]])
    lk.attach(model, lk.LoRA(r=2, alpha=6), targets=[f"{layer}[q]"], name="a", seed=0)
    A, B = lk.trainable(model).values()
    with torch.no_grad():
        B.normal_()
        _, module, _ = fused(by_hand, layer)
        delta = 3.0 * B @ A
        weight = module.weight.T if family == "gpt2" else module.weight  # type: ignore[operator, union-attr]
        for i, row in enumerate(rows()["q"]):
            weight[row] += delta[i]  # type: ignore[index]
        torch.testing.assert_close(model(ids)[0], by_hand(ids)[0], rtol=1e-10, atol=1e-10)
        lk.merge(model)
        torch.testing.assert_close(model(ids)[0], by_hand(ids)[0], rtol=1e-10, atol=1e-10)


def test_a_cross_attention_has_k_and_v_in_one_layer() -> None:
    config = transformers.GPT2Config(vocab_size=11, add_cross_attention=True, **GPT2)
    model = transformers.AutoModel.from_config(config)
    assert [t.out for t in lk.find(model, ["crossattention.c_attn[k]", "crossattention.c_attn[v]"])] == [D, D]
    with pytest.raises(UnsupportedTargetError, match="no part 'q': its parts are k, v"):
        lk.find(model, ["crossattention.c_attn[q]"])


@pytest.mark.parametrize("kind", ["Phi3", "Glm", "Glm4"])
def test_gate_and_up(kind: str) -> None:
    options = {**PLAIN, "num_key_value_heads": 2, "head_dim": HEAD}
    model = transformers.AutoModel.from_config(
        getattr(transformers, kind + "Config")(vocab_size=11, **options)
    )
    mlp = model.layers[0].mlp.double()
    gate, up = lk.find(model, ["layers.0.mlp.gate_up_proj[gate]", "layers.0.mlp.gate_up_proj[up]"])
    assert (gate.out, up.out) == (20, 20)
    x = torch.randn(3, D, dtype=torch.float64)
    both = mlp.gate_up_proj(x)
    expected = mlp.down_proj(up.select(both) * nn.functional.silu(gate.select(both)))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_the_parts_of_a_multihead_attention(name: str) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(D, HEADS)})
    for i, part in enumerate("qkv"):
        (target,) = lk.find(model, [f"attn.{name}[{part}]"], adapts="parameter")
        want = getattr(model["attn"], name).detach()[i * D : (i + 1) * D]
        assert torch.equal(target.weight(), want.reshape(D, -1))
    (target,) = lk.find(model, ["attn[q]"])
    assert target.path == "attn.in_proj_weight[q]"


def test_every_row_of_the_table_names_classes_that_transformers_has() -> None:
    known = {name for family in FAMILIES for name in [type(m).__name__ for m in build(family).modules()]}
    others = {"DecisionTransformerGPT2Attention", "ImageGPTAttention", "Phi3MLP", "GlmMLP", "Glm4MLP"}
    named = {owner for layout in LAYOUTS for owner in layout.owners} - {"MultiheadAttention"}
    assert named <= known | others
