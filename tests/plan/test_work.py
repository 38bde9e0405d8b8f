"""How much a step computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.methods import LoRA
from lorakit.plan import Run, architecture, count
from lorakit.plan.work import training_flops
from tests.tiny_chat import save_tiny_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("m"), hidden_size=64, intermediate_size=128)


def test_a_step_is_two_products_a_weight_forward_and_two_backward(folder: Path) -> None:
    base = architecture(folder)
    method, run = LoRA(r=2), Run(batch=2, length=32, device="cpu")
    counts = count(base.model, method, "all-linear")
    tokens = run.batch * run.length
    linear = sum(
        p.numel() for name, p in base.model.named_parameters() if p.dim() == 2 and "embed" not in name
    )
    lora = counts.stored
    # 2 a multiplication-addition; the base forward and dx; the adapter's own gradients besides. The first layer's
    # projections need no dx.
    flops = training_flops(base, counts, run) / tokens
    assert 4 * linear * 0.8 < flops < 1.3 * (4 * linear + 6 * lora)
    assert training_flops(base, counts, Run(batch=4, length=32, device="cpu")) == pytest.approx(
        2 * flops * tokens, rel=1e-6
    )


def test_checkpointing_computes_more(folder: Path) -> None:
    base = architecture(folder)
    counts = count(base.model, LoRA(r=2), "all-linear")
    plain = training_flops(base, counts, Run(batch=2, length=32, device="cpu"))
    again = training_flops(base, counts, Run(batch=2, length=32, device="cpu", checkpointing=True))
    assert 1.2 < again / plain < 1.6
