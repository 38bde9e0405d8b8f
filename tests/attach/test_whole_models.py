"""Real model classes: attach, run, merge, switch, mix rows, detach; nothing about them is special-cased."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, RoutingError, UnmatchedTargetError
from tests.attach.architectures import ARCHITECTURES, ids, llama, run_text
from tests.attach.small_models import fill, picture, same_values, values

CASES = [(name, which) for name in ARCHITECTURES for which in ("all-linear", "own")]


def all_but_the_gate(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not path.endswith(("expert_gate", "lm_head"))


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def adapted(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], Tensor], Any, float]]:
    """A model in float64 where its kernels allow it, how to run it, targets, and how exact merging must be."""
    name, which = request.param
    torch.manual_seed(0)
    make, run, own = ARCHITECTURES[name]
    dtype, tolerance = (torch.float32, 1e-5) if name in ("mixtral", "qwen-moe") else (torch.float64, 1e-10)
    torch.set_default_dtype(dtype)
    model = make()
    if (name, which) == ("qwen-moe", "all-linear"):
        # Its gate is a 1 x 16 matrix, which has no rank 2: the error says what to do.
        with pytest.raises(ConfigError, match=r"at most 1.*rank_pattern.*exclude"):
            lk.attach(model, lk.LoRA(r=2))
        chosen: Any = all_but_the_gate
    else:
        chosen = which if which == "all-linear" else own
    yield model, run, chosen, tolerance
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", [lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2))], ids=["lora", "dora"])
def test_attach_run_merge_unmerge_detach(adapted: Any, method: Any) -> None:
    model, run, targets, tolerance = adapted
    before = picture(model)
    with torch.no_grad():
        base = run(model)
        report = lk.attach(model, method, targets, name="a")
        assert (run(model) - base).abs().max() < tolerance / 10  # nothing has been learnt so far
        fill(model, std=0.05)
        unmerged = run(model)
        assert (unmerged - base).abs().max() > 1e-4
        assert lk.report(model).never_ran == ()
        stock = values(model)
        lk.merge(model)
        torch.testing.assert_close(run(model), unmerged, atol=tolerance, rtol=0)
        lk.unmerge(model)
        assert same_values(model, stock)
        with lk.use(model, None):
            assert torch.equal(run(model), base)
    assert report.parameters == sum(p.numel() for p in lk.trainable(model).values())
    lk.detach(model)
    assert picture(model) == before


def test_gradients_reach_every_adapter_and_nothing_else(adapted: Any) -> None:
    model, run, targets, _ = adapted
    lk.attach(model, lk.LoRA(r=2), targets)
    fill(model, std=0.05)
    run(model).pow(2).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lk.trainable(model).values())
    assert all(p.grad is None for n, p in model.named_parameters() if "lorakit" not in n)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_rows_of_a_batch_equal_the_single_runs(name: str) -> None:
    make, run, _ = ARCHITECTURES[name]
    model = make()
    for adapter, seed in (("a", 1), ("b", 2)):
        lk.attach(model, lk.LoRA(r=2), name=adapter)
        fill(model, adapter, seed=seed, std=0.05)
    with torch.no_grad():
        alone = {}
        for route in ("a", "b", None):
            with lk.use(model, route):
                alone[route] = run(model)
        with lk.use(model, rows=["b", None, "a"]):
            mixed = run(model)
    for i, route in enumerate(["b", None, "a"]):
        torch.testing.assert_close(mixed[i], alone[route][i], atol=1e-5, rtol=1e-5)


def test_rows_in_a_mixture_of_experts_are_right_or_refused() -> None:
    make, run, targets = ARCHITECTURES["mixtral"]
    model = make()
    lk.attach(model, lk.LoRA(r=2), targets)
    with (
        torch.no_grad(),
        lk.use(model, rows=["default", None, None]),
        pytest.raises(RoutingError, match="of their own"),
    ):
        run(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_implementation_of_attention(attention: str) -> None:
    model = llama(attn_implementation=attention)
    lk.attach(model, lk.LoRA(r=2))
    fill(model, std=0.05)
    with torch.no_grad():
        unmerged = run_text(model)
        lk.merge(model)
        torch.testing.assert_close(run_text(model), unmerged, atol=1e-5, rtol=1e-5)


def test_the_head_is_left_out_of_all_linear() -> None:
    for name, head in (
        ("llama", "lm_head"),
        ("bert", "classifier"),
        ("vit", "classifier"),
        ("gpt2", "lm_head"),
    ):
        model = ARCHITECTURES[name][0]()
        assert not any(s.path.endswith(head) for s in lk.attach(model, lk.LoRA(r=2)).sites)


def test_a_classifier_beside_lora() -> None:
    """What PEFT calls modules_to_save."""
    make, run, _ = ARCHITECTURES["bert"]
    model = make()
    before = picture(model)
    lk.attach(model, {"all-linear": lk.LoRA(r=2), "classifier": lk.FullFineTuning()}, name="a")
    lk.attach(model, lk.LoRA(r=2), name="b")
    fill(model, std=0.05)
    with torch.no_grad():
        unmerged = run(model)
        with lk.use(model, {"a": 1, "b": 0.5}):
            both = run(model)
        lk.merge(model, {"a": 1, "b": 0.5})
        torch.testing.assert_close(run(model), both, atol=1e-5, rtol=1e-5)
        lk.unmerge(model)
        assert torch.equal(run(model), unmerged)
    lk.detach(model)
    assert picture(model) == before


def test_layers_whose_names_differ_by_model_are_suggested() -> None:
    with pytest.raises(UnmatchedTargetError, match=r"'q_proj' matches nothing.*c_attn"):
        lk.attach(ARCHITECTURES["gpt2"][0](), lk.LoRA(r=2), ["q_proj", "v_proj"])


def test_gradient_checkpointing_of_transformers() -> None:
    model = llama()
    lk.attach(model, lk.LoRA(r=2), name="a")
    lk.attach(model, lk.LoRA(r=2), name="b")
    fill(model, std=0.05)
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with lk.use(model, "b"):
            loss = run_text(model).pow(2).mean()
        loss.backward()
        return {n: p.grad.clone() for n, p in lk.trainable(model).items() if p.grad is not None}

    want = gradients()
    assert all(".b." in n for n in want)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lk.checkpoint_contexts})
    got = gradients()
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_deep_copy_of_a_whole_model() -> None:
    model = llama(tie_word_embeddings=True)
    lk.attach(model, lk.LoRA(r=2), ["q_proj", "embed_tokens"])
    fill(model, std=0.05)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(run_text(other), run_text(model))
    lk.merge(other)
    lk.unmerge(other)
    lk.detach(other)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_token_rows_act_at_every_place_that_a_table_is_tied_to() -> None:
    """T5 keeps its table under a name whose module never runs; encoder, decoder and head read it as their own."""
    make, run, _ = ARCHITECTURES["t5"]
    model = make()
    before = picture(model)
    lk.attach(model, lk.TokenRows((4, 9)), ["shared"])
    fill(model, std=1.0)
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    with torch.no_grad():
        plain.shared.weight[[4, 9]] = model.shared.lorakit.output.default.rows
        want = run(plain)
        torch.testing.assert_close(run(model), want)
        lk.merge(model)
        torch.testing.assert_close(run(model), want)
    lk.detach(model)
    assert picture(model) == before


def test_resizing_embeddings_before_attaching() -> None:
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(55)
    lk.attach(model, {"embed_tokens": lk.TokenRows(range(50, 55)), "q_proj": lk.LoRA(r=2)})
    fill(model, std=0.5)
    with torch.no_grad():
        unmerged = model(input_ids=torch.tensor([[50, 51, 3, 54]])).logits
        lk.merge(model, permanent=True)
        torch.testing.assert_close(
            model(input_ids=torch.tensor([[50, 51, 3, 54]])).logits, unmerged, atol=1e-5, rtol=1e-5
        )
    assert ids().max() < 50
