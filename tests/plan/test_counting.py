"""Counting refuses what attaching would refuse, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import nn

import lorakit as lk
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.plan import count
from lorakit.plan.architectures import architecture
from lorakit.plan.fit import RANKS, fit, size_of

TOO_MUCH: dict[str, Method | Mapping[str, Method]] = {
    "lora": lk.LoRA(r=5),
    "lora-pissa": lk.LoRA(r=5, init="pissa"),
    "lora-fa": lk.LoRAFA(r=5),
    "dora": lk.DoRA(lk.LoRA(r=5)),
    "loha": lk.LoHa(r=5),
    "adalora": lk.AdaLoRA(init_r=5, target_r=1),
    "dylora": lk.DyLoRA(r=5),
    "pattern": lk.LoRA(r=2, rank_pattern={"1": 5}),
    "mapping": {"0": lk.LoRA(r=2), "1": lk.LoHa(r=5)},
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def kernels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3))


@pytest.mark.parametrize("method", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_rank_that_no_matrix_can_have_is_refused_as_attach_refuses_it(
    method: Method | Mapping[str, Method],
) -> None:
    with pytest.raises(ConfigError, match=r"=5 is more than a 4 x 8 matrix can have at '1'") as attached:
        lk.attach(model(), method)
    with pytest.raises(ConfigError) as counted:
        count(model(), method)
    assert str(counted.value) == str(attached.value)


def test_the_rank_of_a_kernel() -> None:
    with pytest.raises(ConfigError, match=r"r=4 makes a product of rank 12.*192 x 9") as attached:
        lk.attach(kernels(), lk.LoRAC(r=4), "all-conv")
    with pytest.raises(ConfigError) as counted:
        count(kernels(), lk.LoRAC(r=4), "all-conv")
    assert str(counted.value) == str(attached.value)


@pytest.mark.parametrize(
    "method",
    [lk.LoRA(r=4), lk.VeRA(r=5), lk.LoKr(r=5), {"all-linear": lk.LoRA(r=5), "1": lk.FullFineTuning()}],
    ids=["largest", "vera", "lokr", "replaced"],
)
def test_what_attach_takes_is_counted(method: Method | Mapping[str, Method]) -> None:
    here = model()
    assert count(model(), method).trainable == lk.attach(here, method).trainable


def test_eva_lowers_ranks_by_itself() -> None:
    """So nothing is refused before the data has been seen."""
    assert count(model(), lk.LoRA(r=5, init="eva")).stored == 5 * (8 + 8) + 5 * (8 + 4)


def test_a_proposal_passes_over_ranks_that_a_target_cannot_have() -> None:
    base = architecture("minilm", task="sequence-classification", num_labels=10)
    found = fit(base, lk.LoRA(), size_of("1GB"), ["query", "classifier"], lengths=[32])
    assert isinstance(found.method, lk.LoRA)
    assert found.method.r == max(r for r in RANKS if r <= 10)
