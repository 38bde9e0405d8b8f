"""The terms that follow from counts alone."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.ops import quantize_nf4
from lorakit.plan import Run, plan
from lorakit.plan.architectures import architecture
from lorakit.plan.fit import fit, size_of
from lorakit.plan.memory import nf4_bytes, weights


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 576), (100, 96)])
def test_nf4_bytes_are_those_of_lorakit(rows: int, columns: int) -> None:
    packed = quantize_nf4(torch.randn(rows, columns))
    assert nf4_bytes(rows * columns) == packed.nbytes


def test_llama_2_7b_in_four_bits() -> None:
    held = weights(architecture("llama-2-7b").model, torch.bfloat16, "nf4")
    assert held.packed_numel == 6_476_005_376
    assert round(held.packed / 1e9, 3) == 3.341
    assert round(held.dense / 1e9, 3) == 0.525
    assert round(held.total / 1e9, 2) == 3.87
    assert round(sum(nf4_bytes(n, double_quant=False) for n in [held.packed_numel]) / 1e9, 3) == 3.643


def test_checkpoints_of_gpt_3() -> None:
    planned = plan_counts("gpt-3-175b", 4)
    assert planned * 2 == 37_748_736  # bytes in float16: the paper's 35 MB is 36.0 MiB
    assert round(planned * 2 / 2**20, 1) == 36.0


def plan_counts(name: str, r: int) -> int:
    from lorakit.plan import count

    return count(architecture(name).model, lk.LoRA(r=r), ["c_attn[q]", "c_attn[v]"]).stored


def test_a_table_has_counts_and_no_activations() -> None:
    planned = plan("sd-1.5-unet", lk.LoRA(r=4), ["to_q", "to_k", "to_v", "to_out.0"])
    assert planned.training is None
    assert planned.file_bytes("float32") == 4 * 797_184
    assert any("no forward pass" in line for line in planned.assumptions)


def test_fit() -> None:
    found = fit("minilm", lk.LoRA(), size_of("400MB"), lengths=[64, 128], run=Run(device="cpu"))
    assert found.proposal is not None
    assert found.proposal.total <= found.usable == 360_000_000
    run = found.proposal.run
    again = plan("minilm", found.method, run=run).training
    assert again is not None
    assert again.total == found.proposal.total
    more = plan("minilm", found.method, run=Run(**{**vars(run), "batch": 2 * run.batch})).training
    assert more is not None
    assert more.total > found.usable
    assert fit("minilm", lk.LoRA(), size_of("1MB"), lengths=[64]).proposal is None


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "3 apples"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        size_of(text)
