"""Several adapters in one pass: the sum of what they hold, and the steps that they take together."""

from __future__ import annotations

import pytest

import lorakit as lk
from lorakit.plan import Run, architecture, plan
from lorakit.plan.counting import count
from lorakit.plan.together import flops_together, plan_together
from lorakit.plan.work import training_flops

RUN = Run(batch=4, length=32, device="cpu", packing=True)


def test_like_adapters_cost_what_one_costs_on_all_rows_and_hold_twice_as_much() -> None:
    base = architecture("smollm2")
    one = count(base.model, lk.LoRA(r=4), "all-linear")
    alone = plan(base, lk.LoRA(r=4), "all-linear", run=RUN)
    both = plan_together(base, {"a": one, "b": one}, RUN, (1, 3))
    assert both.counts.trainable == 2 * one.trainable
    assert both.training is not None
    assert alone.training is not None
    assert both.training.optimizer == 2 * alone.training.optimizer
    assert both.training.weights == alone.training.weights
    peaks = [plan.training.activations + plan.training.gradients for plan in (both, alone) if plan.training]
    assert peaks[0] > peaks[1]  # rows are cut apart and put together again
    # The first block's rows need a gradient once they are cut apart: a product more in thousands.
    flops = flops_together(base, {"a": one, "b": one}, RUN, (1, 3))
    assert flops == pytest.approx(training_flops(base, one, RUN), rel=1e-3)
    assert not any("lora" in name for name, _ in base.model.named_parameters())


def test_backward_goes_as_far_down_as_the_lowest_adapter_of_all() -> None:
    base = architecture("smollm2")
    full = count(base.model, lk.LoRA(r=4), "all-linear")
    upper = count(base.model, lk.LoRA(r=4), r"model[.]layers[.]29[.].*_proj")
    flops = [flops_together(base, {"a": upper, "b": other}, RUN, (2, 2)) for other in (upper, full)]
    assert flops[0] < 0.7 * flops[1]
