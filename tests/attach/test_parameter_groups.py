"""LoRA+: which parameters are fast, by how much, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, NotAttachedError
from tests.attach.architectures import llama, run_text

Groups = list[dict[str, Any]]


def names_in(model: nn.Module, groups: Groups) -> dict[str, tuple[float, float]]:
    """Name to learning rate and weight decay; each parameter must stand in one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, name
            found[name] = (group["lr"], group["weight_decay"])
    return found


def adapted(adapter: Any, targets: Any = "all-linear") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama()
    lk.attach(model, adapter, None if isinstance(adapter, Mapping) else targets, seed=0)
    return model


def step(model: nn.Module) -> None:
    run_text(model).square().mean().backward()


MIXED = {
    "all-linear": lk.DoRA(lk.LoRA(r=2)),
    "embed_tokens": lk.LoRA(r=2),
    "norm": lk.FullFineTuning(),
    "lm_head": lk.FullFineTuning(),
}


@pytest.mark.parametrize(
    "adapter",
    [lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2)), {"q_proj": lk.LoRA(r=2, bias=True)}, MIXED],
    ids=["lora", "dora", "bias", "mixed"],
)
def test_every_trainable_parameter_stands_in_one_group_and_b_alone_is_fast(adapter: Any) -> None:
    model = adapted(adapter)
    found = names_in(model, lk.parameter_groups(model, lr=1e-3, lora_plus_ratio=20.0, weight_decay=0.1))
    assert found.keys() == lk.trainable(model).keys()
    assert any(name.endswith("lora_B") for name in found)
    for name, (lr, decay) in found.items():
        assert lr == (1e-3 * 20.0 if name.endswith("lora_B") else 1e-3), name
        one_dimensional = name.endswith(("magnitude", "lora_bias")) or "norm" in name
        assert decay == (0.0 if one_dimensional else 0.1), name


def test_slow_groups_come_first_and_say_what_they_are() -> None:
    model = adapted(MIXED)
    groups = lk.parameter_groups(model, lr=1e-3, weight_decay=0.1, embedding_lr=1e-6)
    assert sorted(g["name"] for g in groups) == ["embedding", "fast", "slow", "slow, no decay"]
    assert groups[0]["name"].startswith("slow")
    assert groups[-1]["name"] == "fast"
    assert groups[-1]["lr"] == 16e-3
    embedding = next(g for g in groups if g["name"] == "embedding")
    assert embedding["lr"] == 1e-6
    assert len(embedding["params"]) == 2


def test_fast_is_explicit() -> None:
    model = adapted(MIXED)

    def fast(roles: Any) -> set[str]:
        found = names_in(model, lk.parameter_groups(model, lr=1.0, lora_plus_ratio=2.0, fast=roles))
        return {name.rsplit(".", 1)[-1] for name, (lr, _) in found.items() if lr == 2.0}

    assert fast(("B",)) == fast("B") == {"lora_B"}
    assert fast(("A",)) == {"lora_A"}
    assert fast(("B", "magnitude")) == {"lora_B", "magnitude"}
    assert fast("copy") == {"value"}
    official = names_in(model, lk.parameter_groups(model, lr=1.0, lora_plus_ratio=2.0, fast="official"))
    for name, (lr, _) in official.items():
        vector = name.endswith("magnitude") or ("norm" in name and "lm_head" not in name)
        assert (lr == 2.0) == (name.endswith("lora_B") or vector), name


def test_a_parameter_of_the_base_that_trains_along_is_slow() -> None:
    model = llama()
    lk.attach(model, lk.LoRA(r=2), freeze=False, seed=0)
    found = names_in(model, lk.parameter_groups(model, lr=1.0, weight_decay=0.1))
    assert found["lm_head.weight"] == (1.0, 0.1)
    assert found["model.norm.weight"] == (1.0, 0.0)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_the_ratio_holds_in_every_optimizer_and_after_every_step_of_a_scheduler(optimizer: Any) -> None:
    model = adapted(lk.DoRA(lk.LoRA(r=2)))
    made = optimizer(lk.parameter_groups(model, lr=3e-4, lora_plus_ratio=16.0, weight_decay=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda i: (i + 1) / 7 if i < 7 else 0.9**i)
    for _ in range(12):
        step(model)
        made.step()
        made.zero_grad()
        scheduler.step()
        rates = {group["name"].split(",")[0]: group["lr"] for group in made.param_groups}
        assert rates["fast"] / rates["slow"] == 16.0


def trained(groups: Callable[[nn.Module], Any], **settings: Any) -> dict[str, torch.Tensor]:
    model = adapted(lk.DoRA(lk.LoRA(r=2)))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, **settings)
    for _ in range(4):
        step(model)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in lk.trainable(model).items()}


def test_ratio_one_is_plain_adamw_bit_for_bit() -> None:
    plain = trained(lambda model: list(lk.trainable(model).values()), weight_decay=0.0)
    ours = trained(lambda model: lk.parameter_groups(model, lr=1e-2, lora_plus_ratio=1.0), weight_decay=0.5)
    assert plain.keys() == ours.keys()
    for name in plain:
        assert torch.equal(plain[name], ours[name]), name


def test_the_first_step_of_b_is_the_ratio_times_as_long() -> None:
    """AdamW's first step is ``lr * sign(g)``, so the ratio shows in the values themselves; with DoRA too."""
    model = adapted(lk.DoRA(lk.LoRA(r=2)))
    before = {name: p.detach().clone() for name, p in lk.trainable(model).items()}
    optimizer = torch.optim.AdamW(lk.parameter_groups(model, lr=1e-3, lora_plus_ratio=8.0))
    step(model)
    optimizer.step()
    seen = set()
    for name, p in lk.trainable(model).items():
        assert p.grad is not None
        clear = p.grad.abs() > 1e-5  # beside AdamW's eps of 1e-8
        length = 8e-3 if name.endswith("lora_B") else 1e-3
        moved = (p - before[name]).abs()[clear]
        torch.testing.assert_close(moved, torch.full_like(moved, length), rtol=0.01, atol=0)
        seen |= {name.rsplit(".", 1)[-1]} if clear.any() else set()
    assert seen == {"lora_B", "magnitude"}  # the gradient of A is 0 while B is


# ---- beside PEFT ---------------------------------------------------------------------------------------------------
def peft_groups(ratio: float, **settings: Any) -> tuple[nn.Module, Groups]:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=True
    )
    model = peft.get_peft_model(llama(), config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, **settings
    )
    return model, optimizer.param_groups


def by_site(model: nn.Module, groups: Groups) -> dict[str, tuple[float, float]]:
    """What both sides call the same: the layer, and which factor it is."""
    found = {}
    for name, rates in names_in(model, groups).items():
        factor = "A" if "_A" in name else "B"
        layer = name.split("base_model.model.")[-1].split(".lora")[0]
        found[f"{layer} {factor}"] = rates
    return found


def test_the_groups_are_pefts_where_peft_is_right() -> None:
    """Rates: A, B, and an embedding with a rate of its own. Decay: what PEFT's own name for it gives."""
    theirs = by_site(*peft_groups(16.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-6))
    model = adapted(lk.LoRA(r=2), ["q_proj", "down_proj", "embed_tokens"])
    groups = lk.parameter_groups(model, lr=1e-3, lora_plus_ratio=16.0, weight_decay=0.1, embedding_lr=1e-6)
    assert by_site(model, groups) == theirs
    assert {lr for lr, _ in theirs.values()} == {1e-3, 16e-3, 1e-6}


def test_peft_ignores_weight_decay_and_we_do_not() -> None:
    """PEFT's groups carry ``weight_decay=0.0`` whatever the optimizer is given: it listens to another name only."""
    peft = pytest.importorskip("peft")
    theirs = by_site(*peft_groups(16.0, weight_decay=0.1))
    if peft.__version__ == "0.21.2":
        assert {decay for _, decay in theirs.values()} == {0.0}
    model = adapted(lk.LoRA(r=2))
    ours = by_site(model, lk.parameter_groups(model, lr=1e-3, weight_decay=0.1))
    assert {decay for _, decay in ours.values()} == {0.1}


def test_pefts_rule_for_vectors_is_ours_when_asked_for() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    in_peft = names_in(theirs, optimizer.param_groups)
    assert {lr for name, (lr, _) in in_peft.items() if "magnitude" in name} == {16e-3}
    model = adapted(lk.DoRA(lk.LoRA(r=2)), ["q_proj"])
    for fast, rate in ((("B",), 1e-3), ("official", 16e-3)):
        ours = names_in(model, lk.parameter_groups(model, lr=1e-3, fast=fast))
        assert {lr for name, (lr, _) in ours.items() if name.endswith("magnitude")} == {rate}


# ---- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lora_plus_ratio": -1.0}, "lora_plus_ratio must be a positive number"),
        ({"embedding_lr": float("nan")}, "embedding_lr must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"fast": ()}, "fast names no role"),
        (
            {"fast": ("magnitud",)},
            r"role 'magnitud'.*Did you mean 'magnitude'\?.*Roles here: A, B, magnitude",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    model = adapted(lk.DoRA(lk.LoRA(r=2)))
    with pytest.raises(ConfigError, match=message):
        lk.parameter_groups(model, **{"lr": 1e-3, **settings})


def test_a_method_without_b_and_a_model_without_anything_to_train() -> None:
    model = adapted(lk.FullFineTuning(), ["lm_head"])
    with pytest.raises(ConfigError, match=r"role 'B', so none would be fast.*Roles here: copy"):
        lk.parameter_groups(model, lr=1e-3)
    assert len(lk.parameter_groups(model, lr=1e-3, lora_plus_ratio=1.0)) == 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to optimize"):
        lk.parameter_groups(model, lr=1e-3)


def test_a_model_without_adapters() -> None:
    with pytest.raises(NotAttachedError):
        lk.parameter_groups(nn.Linear(2, 2), lr=1e-3)
