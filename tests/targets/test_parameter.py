"""Bare parameters of every size, and torch's own encoder layers, which read them from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import RoutingError
from lorakit.targets import ParameterTarget, find
from lorakit.targets.recognise import parameter_target
from tests.contracts.pairs import close, randomise


class Bare(nn.Module):
    """One parameter of any size."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(size))
        self.bias = nn.Parameter(torch.randn(3))


@pytest.mark.parametrize(
    ("size", "batch", "out", "in_"),
    [
        ((), (), 1, 1),
        ((4,), (), 4, 1),
        ((4, 5), (), 4, 5),
        ((2, 4, 5), (2,), 4, 5),
        ((3, 2, 4, 5), (3, 2), 4, 5),
    ],
)
def test_a_parameter_of_any_size_is_a_stack(
    size: tuple[int, ...], batch: tuple[int, ...], out: int, in_: int
) -> None:
    model = Bare(*size)
    target = parameter_target(model, "value")
    assert isinstance(target, ParameterTarget)
    assert (target.batch, target.out, target.in_, target.shape.stored) == (batch, out, in_, size)
    assert target.weight().shape == (*batch, out, in_)
    assert torch.equal(target.from_matrix(target.weight()), model.value)
    assert target.bias is None, "the module's bias is not this parameter's"


def test_what_the_module_computes_with_it_is_not_known() -> None:
    (target,) = find(Bare(4, 5), ["value"])
    with pytest.raises(RoutingError, match="'value' is a bare parameter"):
        target.apply(torch.ones(5), target.weight())
    with pytest.raises(RoutingError, match="'value' is a bare parameter"):
        target.add_low_rank(torch.ones(4), torch.ones(5), torch.ones(1, 5), torch.ones(4, 1), 1.0, 0.0)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "targets",
    [
        ["in_proj_weight"],
        ["out_proj"],
        ["linear1"],
        ["linear2"],
        ["in_proj_weight", "out_proj", "linear1", "linear2"],
    ],
    ids=["in", "out", "up", "down", "all"],
)
def test_an_encoder_layer_of_torch_cannot_pass_by_its_adapters(
    targets: list[str], training: bool, grad: bool
) -> None:
    """In eval mode without grad it may run a fused kernel that reads the weights and calls no layer."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double().train(training)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    lk.attach(model, lk.LoRA(r=2), targets, name="a", seed=0)
    lk.attach(model, lk.LoRA(r=1), targets, name="b", seed=1)
    randomise((p for n, p in model.named_parameters() if "lorakit" in n), torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        expected = {}
        for name in ("a", "b"):
            lk.merge(model, name)
            expected[name] = model(x)
            lk.unmerge(model)
            with lk.use(model, name):
                close(model(x), expected[name], 1e-12)
        with lk.use(model, rows=["a", "b", "b", "a"]):
            y = model(x)
    close(y, torch.stack([expected[n][i] for i, n in enumerate("abba")]), 1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "targets", [["in_proj_weight"], ["out_proj"], ["out_proj.bias"]], ids=["in", "out", "bias"]
)
def test_rows_of_an_attention_with_masks_and_weights(targets: list[str], batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    for name in ("a", "b"):
        lk.attach(model, lk.FullFineTuning(), targets, name=name)
    randomise((p for n, p in model.named_parameters() if "lorakit" in n), torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    padding = torch.zeros(4, 3, dtype=torch.bool)
    padding[1, 2] = padding[3, 1] = True
    causal = torch.zeros(4 * 2, 3, 3, dtype=torch.float64).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e9)

    def run(rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        mine = x[rows] if batch_first else x[rows].transpose(0, 1)
        mask = causal.view(4, 2, 3, 3)[rows].flatten(0, 1)
        y, weights = model(mine, mine, mine, key_padding_mask=padding[rows].double() * -1e9, attn_mask=mask)
        return (y if batch_first else y.transpose(0, 1)), weights

    routes = ["a", None, "b", "a"]
    with lk.use(model, rows=routes):
        y, weights = run()
    for i, route in enumerate(routes):
        with lk.use(model, route):
            alone, own = run(slice(i, i + 1))
        close(y[i : i + 1], alone, 1e-12)
        close(weights[i : i + 1], own, 1e-12)
