"""Seventeen defects of PEFT 0.21.2, each with a test of what lorakit does there, and a check that PEFT shows it.

The second kind documents the first: it must show the defect on the version that it was found in, and is passed over
when a later PEFT has repaired it.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNameError,
    RoutingError,
    UnmatchedTargetError,
)
from tests.attach.architectures import llama, run_text
from tests.attach.small_models import Mlp, bits, fill, picture, same_values, values, with_adapters

FOUND_IN = "0.21.2"
SHOWN_BY: dict[str, Callable[[Path], bool]] = {}
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def in_peft(number: str) -> Callable[[Callable[[Path], bool]], Callable[[Path], bool]]:
    """Register what shows a defect in PEFT: a function that returns whether it is there."""

    def register(shows: Callable[[Path], bool]) -> Callable[[Path], bool]:
        SHOWN_BY[number] = shows
        return shows

    return register


@pytest.mark.parametrize("number", [f"{i:02}" for i in range(1, 18)])
@pytest.mark.filterwarnings("ignore")
def test_peft_shows_defect(number: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if not SHOWN_BY[number](tmp_path):
        assert peft.__version__ != FOUND_IN, f"defect {number} does not show in PEFT {FOUND_IN}"
        pytest.skip(f"repaired in PEFT {peft.__version__}")


def peft_model(model: nn.Module, *names: str, **config: Any) -> Any:
    """A PEFT model with random adapters."""
    import peft

    settings = {
        "r": 2,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "target_modules": ["fc1", "fc2"],
        **config,
    }
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**settings), adapter_name=names[0] if names else "default"
    )
    for name in names[1:]:
        wrapped.add_adapter(name, peft.LoraConfig(**settings))
    return wrapped


def differ(one: Tensor, two: Tensor) -> bool:
    return not torch.allclose(one.float(), two.float(), atol=1e-3, rtol=1e-3)


# ---- 1: nn.MultiheadAttention -------------------------------------------------------------------------------------
class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def attention_by_hand(base: SelfAttention, deltas: dict[str, Tensor], x: Tensor) -> Tensor:
    """A plain attention with one delta in each projection."""
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain.attn.in_proj_weight += deltas["in"]
        plain.attn.out_proj.weight += deltas["out"]
    return plain(x)


def test_01_attention_gets_each_delta_once_and_its_base_does_not_drift() -> None:
    base, x = SelfAttention(), torch.randn(3, 5, 8)
    model = with_adapters(copy.deepcopy(base), "a", targets=["attn"])
    tensors = lk.extract(model, "a").tensors
    deltas = {
        key: 8.0 * tensors[path]["lora_B"] @ tensors[path]["lora_A"]
        for key, path in (("in", "attn.in_proj_weight"), ("out", "attn.out_proj"))
    }
    want = attention_by_hand(base, deltas, x)
    torch.testing.assert_close(model(x), want)
    lk.merge(model)
    torch.testing.assert_close(model(x), want)

    half = with_adapters(SelfAttention().to(torch.bfloat16), "a", targets=["attn"])
    before, x = values(half), x.to(torch.bfloat16)
    with torch.no_grad():
        for _ in range(300):
            half(x)
    assert same_values(half, before)


@in_peft("01")
def attention_gets_the_out_delta_twice(tmp: Path) -> bool:
    base, x = SelfAttention(), torch.randn(3, 5, 8)
    model = peft_model(copy.deepcopy(base), target_modules=["attn"])
    layer = model.base_model.model.attn

    def delta(owner: Any) -> Tensor:
        return 8.0 * (owner.lora_B["default"].weight @ owner.lora_A["default"].weight).detach()

    want = attention_by_hand(base, {"in": delta(layer), "out": delta(layer.base_layer.out_proj)}, x)
    return differ(model(x), want)


# ---- 2: convolutions ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [{"dilation": 2}, {"padding": 2, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"}],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_02_convolutions_keep_dilation_and_padding_mode(settings: dict[str, Any], groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups, **settings))
    with_adapters(model, "a", targets=["0"])
    x = torch.randn(2, 4, 9, 9)
    unmerged = model(x)
    lk.merge(model)
    torch.testing.assert_close(model(x), unmerged)


@in_peft("02")
def convolutions_lose_dilation_and_padding_mode(tmp: Path) -> bool:
    x = torch.randn(2, 4, 9, 9)
    try:
        peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2)), target_modules=["0"])(x)
        crashed = False
    except RuntimeError:
        crashed = True
    model = peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular")), target_modules=["0"]
    )
    unmerged = model(x)
    model.merge_adapter()
    return crashed and differ(model(x), unmerged)


# ---- 3: replacing an adapter --------------------------------------------------------------------------------------
def test_03_replacing_one_adapter_leaves_those_with_similar_names_and_saves_its_own_settings(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = Mlp()
    other = copy.deepcopy(base)
    lk.attach(other, lk.LoRA(r=4, alpha=4, rank_pattern={"fc1": 3}), name="new")
    fill(other, "new", seed=9)
    lk.save(other, tmp_path / "new", name="new")
    model = with_adapters(base, "a", "a1", "a12", "1")
    kept = {name: lk.extract(model, name) for name in ("a", "a12", "1")}
    lk.detach(model, "a1")
    lk.load(model, tmp_path / "new", name="a1")
    for name, state in kept.items():
        now = lk.extract(model, name)
        assert now.spec == state.spec
        assert all(torch.equal(now.tensors[p][k], t) for p, g in state.tensors.items() for k, t in g.items())
    with lk.use(model, "a1"):
        torch.testing.assert_close(model(X), other(X))
    lk.save(model, tmp_path / "again", name="a1")
    fresh = Mlp()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    lk.load(fresh, tmp_path / "again")
    torch.testing.assert_close(fresh(X), other(X))
    assert [s.rank for s in lk.report(fresh).adapters[0].sites] == [3, 4]


@in_peft("03")
def hotswap_zeroes_an_adapter_with_a_similar_name(tmp: Path) -> bool:
    from peft.utils.hotswap import hotswap_adapter

    peft_model(Mlp(), r=4).save_pretrained(tmp)
    model = peft_model(Mlp(), "a1", "a12", r=4)
    hotswap_adapter(model, str(tmp), "a1")
    layer = model.base_model.model.fc1
    return bool((layer.lora_A["a12"].weight == 0).all())


# ---- 4: keys that do not match ------------------------------------------------------------------------------------
def test_04_missing_unexpected_and_foreign_tensors_are_errors_that_name_them(tmp_path: Path) -> None:
    lk.save(with_adapters(Mlp(), "a"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    before = picture(model := Mlp())
    key = "base_model.model.fc1.lora_A.weight"

    def rewritten(changed: dict[str, Tensor]) -> None:
        save_file(changed, weights, metadata={"format": "pt"})

    rewritten({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(AdapterFileError, match=r"fc1.*lora_A"):
        lk.load(model, tmp_path)
    rewritten({**tensors, "base_model.model.fc9.lora_A.weight": torch.zeros(2, 6)})
    with pytest.raises(AdapterFileError, match="fc9"):
        lk.load(model, tmp_path)
    rewritten({**tensors, "base_model.model.fc1.lora_C.weight": torch.zeros(2, 6)})
    with pytest.raises(AdapterFileError, match="lora_C"):
        lk.load(model, tmp_path)
    rewritten({k.replace("fc1", "fc_1").replace("fc2", "fc_2"): v for k, v in tensors.items()})
    with pytest.raises(AdapterFileError, match="fc_1"):
        lk.load(model, tmp_path)
    rewritten({**tensors, key: torch.zeros(2, 7)})
    with pytest.raises(AdapterMismatchError, match=r"8 x 7.*8 x 6"):
        lk.load(model, tmp_path)
    assert picture(model) == before
    rewritten(tensors)
    lk.load(model, tmp_path)


@in_peft("04")
def foreign_tensors_pass_in_silence(tmp: Path) -> bool:
    import peft

    peft_model(Mlp()).save_pretrained(tmp)
    weights = tmp / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(
        {**tensors, "base_model.model.fc9.lora_A.weight": torch.zeros(2, 6)},
        weights,
        metadata={"format": "pt"},
    )
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(Mlp(), tmp)
    return not any("fc9" in str(w.message) for w in raised)


# ---- 5: an exception in a mixed batch -----------------------------------------------------------------------------
def test_05_an_exception_in_a_mixed_batch_leaves_nothing_behind() -> None:
    model = with_adapters(Mlp(), "a", "b")
    want, before = model(X), picture(model)
    armed = model.norm.register_forward_pre_hook(lambda m, i: 1 / 0)
    with pytest.raises(ZeroDivisionError), lk.use(model, rows=["a", "b", None, "a", "b"]):
        model(X)
    armed.remove()
    assert picture(model) == before
    assert torch.equal(model(X), want)


@in_peft("05")
def an_exception_leaves_hooks_behind(tmp: Path) -> bool:
    model = peft_model(Mlp(), "a", "b").eval()
    armed = model.base_model.model.norm.register_forward_pre_hook(lambda m, i: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X, adapter_names=["a", "b", "__base__", "a", "b"])
    armed.remove()
    return any(m._forward_pre_hooks for m in model.modules())


# ---- 6: a mixed batch in which only some adapters train modules in full -------------------------------------------
def test_06_a_mixed_batch_in_which_one_adapter_has_a_head_of_its_own() -> None:
    model = Mlp()
    lk.attach(model, {"fc1": lk.LoRA(r=2), "fc2": lk.FullFineTuning()}, name="a")
    lk.attach(model, lk.LoRA(r=2), ["fc1"], name="b")
    fill(model)
    rows = ["a", "b", None, "a", "b"]
    each = []
    for i, row in enumerate(rows):
        with lk.use(model, row):
            each.append(model(X[i : i + 1]))
    with lk.use(model, rows=rows):
        torch.testing.assert_close(model(X), torch.cat(each))


@in_peft("06")
def a_mixed_batch_with_one_head_fails(tmp: Path) -> bool:
    import peft

    model = peft_model(Mlp(), "a", target_modules=["fc1"], modules_to_save=["fc2"])
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["fc1"]))
    try:
        model.eval()(X, adapter_names=["a", "b", "__base__", "a", "b"])
    except KeyError:
        return True
    return False


# ---- 7: eval mode -------------------------------------------------------------------------------------------------
def test_07_a_model_in_eval_stays_in_eval(tmp_path: Path) -> None:
    model = Mlp().eval()
    lk.attach(model, lk.LoRA(r=2, dropout=0.5), name="a")
    fill(model)
    lk.save(model, tmp_path, name="a")
    lk.load(model, tmp_path, name="b")
    assert not any(m.training for m in model.modules())
    for name in "ab":
        with lk.use(model, name):
            assert torch.equal(model(X), model(X))


@in_peft("07")
def a_new_adapter_is_in_train_mode(tmp: Path) -> bool:
    import peft

    model = peft_model(Mlp(), "a").eval()
    model.add_adapter(
        "b", peft.LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.5, init_lora_weights=False)
    )
    model.set_adapter("b")
    return any(m.training for m in model.modules()) and differ(model(X), model(X))


# ---- 8: requires_grad ---------------------------------------------------------------------------------------------
def test_08_switching_adapters_never_touches_requires_grad(tmp_path: Path) -> None:
    model = with_adapters(Mlp(), "a")
    lk.save(model, tmp_path, name="a")
    lk.load(model, tmp_path, name="b")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(flag for n, flag in flags.items() if ".b." in n)
    for route in ("b", None, ["a", "b"], "a"):
        lk.set_active(model, route)
        with lk.use(model, None):
            pass
        with lk.use(model, route):
            assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    lk.merge(model, "b")
    lk.unmerge(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@in_peft("08")
def disabling_an_adapter_for_inference_makes_it_trainable(tmp: Path) -> bool:
    import peft

    peft_model(Mlp()).save_pretrained(tmp)
    model = peft.PeftModel.from_pretrained(Mlp(), tmp)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        pass
    return any(p.requires_grad for p in model.parameters())


# ---- 9: replicated layers -----------------------------------------------------------------------------------------
def replicated(*, own_modules: bool) -> nn.Module:
    """A stack whose second half uses the weights of the first: by modules of its own, or by the same modules again."""
    torch.manual_seed(0)
    model = llama()
    for layer in list(model.model.layers):
        shared = {id(p): p for p in layer.parameters()}
        model.model.layers.append(copy.deepcopy(layer, shared) if own_modules else layer)
    model.config.num_hidden_layers = 4
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("own_modules", [True, False])
def test_09_replicated_layers_merge_to_the_same_output(own_modules: bool) -> None:
    model = replicated(own_modules=own_modules)
    before = picture(model)
    sites = lk.attach(model, lk.LoRA(r=2), ["q_proj", "up_proj"]).sites
    assert len(sites) == (8 if own_modules else 4)
    fill(model)
    with torch.no_grad():
        unmerged = run_text(model)
        lk.merge(model)
        torch.testing.assert_close(run_text(model), unmerged, atol=1e-5, rtol=1e-5)
    lk.detach(model)
    assert picture(model) == before


@in_peft("09")
def replicated_layers_merge_to_another_output(tmp: Path) -> bool:
    model = peft_model(llama(), target_modules=["q_proj", "up_proj"], layer_replication=[[0, 2], [0, 2]])
    model.base_model.model.config.use_cache = False
    with torch.no_grad():
        unmerged = run_text(model)
        model.merge_adapter()
        return differ(run_text(model), unmerged)


# ---- 10: tied embeddings ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_10_a_tied_weight_is_merged_only_where_it_was_adapted_also_on_disk(
    targets: list[str], tmp_path: Path
) -> None:
    import transformers as hf

    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with_adapters(model, "a", targets=targets)
    with torch.no_grad():
        unmerged = run_text(model)
        lk.merge(model)
        torch.testing.assert_close(run_text(model), unmerged, atol=1e-5, rtol=1e-5)
        lk.unmerge(model)
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(run_text(model), unmerged)
        lk.merge(model, permanent=True)
        torch.testing.assert_close(run_text(model), unmerged, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        reloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(run_text(reloaded), unmerged, atol=1e-5, rtol=1e-5)


@in_peft("10")
def merging_a_tied_embedding_changes_the_head(tmp: Path) -> bool:
    model = peft_model(llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    with torch.no_grad():
        unmerged = run_text(model)
        model.merge_adapter()
        return differ(run_text(model), unmerged)


# ---- 11: merging one of two active --------------------------------------------------------------------------------
def test_11_merging_one_of_two_active_adapters_keeps_the_other() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.set_active(model, ["a", "b"])
    both = model(X)
    lk.merge(model, ["a"])
    torch.testing.assert_close(model(X), both)
    with lk.use(model, "a"):
        only_a = model(X)
    lk.unmerge(model)
    assert torch.equal(model(X), both)
    with lk.use(model, "a"):
        torch.testing.assert_close(model(X), only_a)


@in_peft("11")
def merging_one_of_two_drops_the_other(tmp: Path) -> bool:
    model = peft_model(Mlp(), "a", "b")
    model.base_model.set_adapter(["a", "b"])
    both = model(X)
    model.merge_adapter(["a"])
    return differ(model(X), both)


# ---- 12: weighted sums --------------------------------------------------------------------------------------------
def test_12_a_weighted_sum_is_the_sum_of_the_changes_whatever_their_scalings() -> None:
    layer = nn.Linear(6, 4).double()
    lk.attach(layer, lk.LoRA(r=4, alpha=16, scaling="rslora"), name="def")
    lk.attach(layer, lk.LoRA(r=2, alpha=3), name="default")
    fill(layer)
    x, weights = X.double(), {"def": 0.7, "default": -0.3}
    t = {name: lk.extract(layer, name).tensors[""] for name in weights}
    delta = {
        "def": 16 / 4**0.5 * t["def"]["lora_B"] @ t["def"]["lora_A"],
        "default": 3 / 2 * t["default"]["lora_B"] @ t["default"]["lora_A"],
    }
    want = x @ (layer.weight + sum(w * delta[n] for n, w in weights.items())).T + layer.bias
    flags = {n: p.requires_grad for n, p in layer.named_parameters()}
    with lk.use(layer, weights):
        torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=0)
    with lk.use(layer, rows=[weights] * 5):
        torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=0)
    lk.merge(layer, weights)
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=0)
    lk.unmerge(layer)
    assert {
        n: p.requires_grad for n, p in layer.named_parameters()
    } == flags  # no name that is part of another is frozen
    with pytest.raises(RoutingError, match="named twice"):
        lk.merge(layer, ["def", "def"])
    with pytest.raises(AdapterNameError, match="already attached"):
        lk.attach(layer, lk.LoRA(r=2), name="def")


@in_peft("12")
def a_weighted_sum_is_another_sum(tmp: Path) -> bool:
    model = peft_model(Mlp(), "default", "b", target_modules=["fc1"], r=4, use_rslora=True)
    layer = model.base_model.model.fc1
    want = layer.get_delta_weight("default") + layer.get_delta_weight("b")
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "def", combination_type="cat")
    frozen = not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    return differ(layer.get_delta_weight("def"), want) and frozen


# ---- 13: entries that match nothing -------------------------------------------------------------------------------
def test_13_one_entry_that_matches_nothing_is_an_error_with_a_suggestion() -> None:
    model = llama()
    before = picture(model)
    with pytest.raises(UnmatchedTargetError, match=r"'v_prj' matches nothing.*Did you mean 'v_proj'"):
        lk.attach(model, lk.LoRA(r=2), ["q_proj", "v_prj"])
    with pytest.raises(UnmatchedTargetError, match=r"'lm_hed' matches nothing.*Did you mean 'lm_head'"):
        lk.attach(model, {"all-linear": lk.LoRA(r=2), "lm_hed": lk.FullFineTuning()})
    with pytest.raises(UnmatchedTargetError, match=r"'down_prj'.*Did you mean 'down_proj'"):
        lk.attach(model, lk.LoRA(r=2, rank_pattern={"down_prj": 4}))
    with pytest.raises(UnmatchedTargetError, match=r"'k_prj'.*Did you mean 'k_proj'"):
        lk.attach(model, lk.LoRA(r=2), exclude=["k_prj"])
    assert picture(model) == before


@in_peft("13")
def an_entry_that_matches_nothing_is_ignored(tmp: Path) -> bool:
    try:
        peft_model(Mlp(), target_modules=["fc1", "fc_two"], modules_to_save=["hed"])
    except ValueError:
        return False
    return True


# ---- 14: what was passed in is not changed ------------------------------------------------------------------------
def test_14_neither_model_nor_method_is_changed_and_prefixes_do_not_nest(tmp_path: Path) -> None:
    method = lk.LoRA(r=2, rank_pattern={"fc1": 1})
    described, targets, model = method.to_json(), ["fc1", "fc2"], Mlp()
    before = picture(model)
    lk.attach(model, method, targets, name="a")
    lk.attach(model, method, targets, name="b")
    assert (method.to_json(), targets) == (described, ["fc1", "fc2"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.r = 3  # type: ignore[misc]
    assert list(lk.extract(model, "b").tensors) == ["fc1", "fc2"]
    lk.save(model, tmp_path, name="b")
    assert {k.split(".lora_")[0] for k in load_file(tmp_path / "adapter_model.safetensors")} == {
        "base_model.model.fc1",
        "base_model.model.fc2",
    }
    lk.detach(model)
    assert picture(model) == before


@in_peft("14")
def wrapping_twice_nests_prefixes(tmp: Path) -> bool:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["fc1"])
    config.target_modules = ["fc1"]
    model = Mlp()
    kind = type(model.fc1)
    peft.get_peft_model(peft.get_peft_model(model, config), config).save_pretrained(tmp)
    nested = any(k.count("base_model.model.") > 1 for k in load_file(tmp / "adapter_model.safetensors"))
    return nested and type(model.fc1) is not kind


# ---- 15: merging in bfloat16 --------------------------------------------------------------------------------------
def test_15_a_bfloat16_merge_rounds_once_and_is_undone_to_the_last_bit() -> None:
    torch.manual_seed(0)
    layer = with_adapters(nn.Sequential(nn.Linear(64, 64).to(torch.bfloat16)), "a")
    t = lk.extract(layer, "a").tensors["0"]
    before = values(layer)
    exact = torch.addmm(layer[0].weight.float(), t["lora_B"], t["lora_A"], alpha=8.0)
    lk.merge(layer)
    assert bits(layer[0].weight)[3] == bits(exact.to(torch.bfloat16))[3]
    lk.unmerge(layer)
    assert same_values(layer, before)


@in_peft("15")
def a_bfloat16_merge_is_not_undone(tmp: Path) -> bool:
    model = peft_model(nn.Sequential(nn.Linear(64, 64).to(torch.bfloat16)), target_modules=["0"])
    before = model.base_model.model[0].base_layer.weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    return not torch.equal(model.base_model.model[0].base_layer.weight, before)


# ---- 16: the folder above -----------------------------------------------------------------------------------------
def test_16_the_folder_above_a_named_adapter_can_be_read_and_the_weights_stay_with_the_model(
    tmp_path: Path,
) -> None:
    saved = with_adapters(Mlp(), "sql")
    lk.save(saved, tmp_path / "sql", name="sql")
    model = Mlp()
    model.load_state_dict({k: v for k, v in saved.state_dict().items() if "lorakit" not in k})
    lk.load(model, tmp_path)
    assert torch.equal(model(X), saved(X))
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
    with torch.device("meta"):
        elsewhere = Mlp()
    lk.load(elsewhere, tmp_path)
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    lk.save(saved, tmp_path / "other", name="sql")
    with pytest.raises(AdapterFileError, match=r"several adapters: other, sql"):
        lk.read(tmp_path)


def test_16_what_peft_writes_for_a_named_adapter_is_found_too(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft_model(Mlp(), "sql")
    wrapped.save_pretrained(tmp_path)
    model = Mlp()
    model.load_state_dict(wrapped.unload().state_dict())
    lk.load(model, tmp_path)
    with lk.use(model, None):
        base = model(X)
    assert differ(model(X), base)


@in_peft("16")
def the_folder_above_a_named_adapter_is_not_found(tmp: Path) -> bool:
    import peft

    peft_model(Mlp(), "sql").save_pretrained(tmp)
    try:
        peft.PeftModel.from_pretrained(Mlp(), tmp)
    except (ValueError, OSError):
        return True
    return False


# ---- 17: layers by their number -----------------------------------------------------------------------------------
class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["k"](torch.tanh(layer["q"](x)))
        return x


@pytest.mark.parametrize(
    "targets",
    [
        ["layers.1.q"],
        ["1.q"],
        r"layers\.1\.q",
        r"layers\.1\.(q|v)",
        lambda path, module: path == "layers.1.q",
    ],
    ids=["path", "ending", "regex", "alternatives", "callable"],
)
def test_17_layers_of_a_list_at_the_top_are_chosen_by_number(targets: Any) -> None:
    assert [s.path for s in lk.attach(Stack(), lk.LoRA(r=2), targets).sites] == ["layers.1.q"]
    several = lk.attach(Stack(), lk.LoRA(r=2, rank_pattern={r"layers\.2\..*": 1}), r"layers\.[12]\..*")
    assert {s.path: s.rank for s in several.sites} == {
        "layers.1.q": 2, "layers.1.k": 2, "layers.2.q": 1, "layers.2.k": 1,
    }  # fmt: skip


@in_peft("17")
def layers_of_a_list_at_the_top_are_not_found(tmp: Path) -> bool:
    try:
        peft_model(Stack(), target_modules=["q"], layers_to_transform=[1])
    except ValueError as error:
        return "not found" in str(error)
    return False
