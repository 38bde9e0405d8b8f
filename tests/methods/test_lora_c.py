"""LoRA-C: both ranks, both ways to reshape, the published counts, loralib's checkpoints."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from tests.contracts.kinds import Host
from tests.contracts.pairs import close
from tests.methods.test_loha import change, own


# ---- ResNets, by their published tables ------------------------------------------------------------------------------
class Block(nn.Module):
    """Convolutions, each with its normalisation, and the shortcut's."""

    def __init__(self, convs: list[tuple[int, int, int]], shortcut: tuple[int, int] | None) -> None:
        super().__init__()
        for i, (in_, out, k) in enumerate(convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(in_, out, k, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
        if shortcut is not None:
            self.downsample = nn.Sequential(nn.Conv2d(*shortcut, 1, bias=False), nn.BatchNorm2d(shortcut[1]))


class ResNet(nn.Module):
    """ResNet for small images, with a 3x3 stem; a block is two 3x3 (``basic``) or 1x1, 3x3 and a wider 1x1."""

    def __init__(self, depths: tuple[int, ...], basic: bool, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)
        in_ = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            out = width if basic else 4 * width
            blocks = []
            for _ in range(depth):
                convs = (
                    [(in_, width, 3), (width, width, 3)]
                    if basic
                    else [(in_, width, 1), (width, width, 3), (width, out, 1)]
                )
                blocks.append(Block(convs, None if in_ == out else (in_, out)))
                in_ = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_, classes)


@pytest.mark.parametrize(
    ("depths", "basic", "classes", "rank", "base", "lora", "head"),
    [
        ((2, 2, 2, 2), True, 10, "r*k", 11_173_962, 66_432, 5_130),
        ((3, 4, 23, 3), False, 100, "r", 42_697_380, 133_760, 204_900),
    ],
    ids=["resnet18", "resnet101"],
)
def test_the_counts_of_the_paper(
    depths: tuple[int, ...], basic: bool, classes: int, rank: str, base: int, lora: int, head: int
) -> None:
    with torch.device("meta"):
        model = ResNet(depths, basic, classes)
    stem = re.compile("conv1")  # the whole path: every block has a conv1 too
    full = lk.FullFineTuning()
    report = lk.attach(model, {"all-conv": lk.LoRAC(r=1, alpha=2, rank=rank), stem: full, "fc": full})
    assert report.base_parameters == base
    assert sum(s.parameters for s in report.sites if s.method == "lora_c") == lora
    trained = {s.path: s.parameters for s in report.sites if s.method == "full"}
    assert trained == {"conv1.weight": 1_728, "fc.weight": head - classes, "fc.bias": classes}
    assert report.trainable == lora + 1_728 + head
    assert 1 - report.trainable / base == pytest.approx({10: 0.99344, 100: 0.99203}[classes], abs=5e-6)


# ---- the formula -----------------------------------------------------------------------------------------------------
def random_layer(conv: nn.Module, **settings: Any) -> Host:
    torch.manual_seed(0)
    model = Host(conv).double()
    lk.attach(model, lk.LoRAC(**settings), ["layer"])
    with torch.no_grad():
        for p in own(model).values():
            p.normal_()
    return model


@pytest.mark.parametrize("reshape", ["permute", "view"])
@pytest.mark.parametrize(("rank", "expected"), [("r*k", 12), ("r", 4)])
def test_the_rank_of_the_matrix_and_of_the_unfolded_kernel(reshape: str, rank: str, expected: int) -> None:
    """8 to 16 channels, k = 3, r = 4: the product has rank 12 or 4, the unfolded kernel may have more."""
    model = random_layer(nn.Conv2d(8, 16, 3), r=4, alpha=4, rank=rank, reshape=reshape)
    p = own(model)
    assert torch.linalg.matrix_rank(p["lora_B"] @ p["lora_A"]) == expected
    unfolded = int(torch.linalg.matrix_rank(change(model).flatten(1)))
    assert (
        unfolded
        == {("permute", "r*k"): 16, ("permute", "r"): 12, ("view", "r*k"): 16, ("view", "r"): 12}[
            reshape, rank
        ]
    )


def test_permute_keeps_channels_apart_and_can_be_undone() -> None:
    model = random_layer(nn.Conv2d(3, 5, 3), r=1, alpha=0.5)
    p = own(model)
    product = 0.5 * p["lora_B"] @ p["lora_A"]
    delta = change(model)
    for o, c, u, v in [(0, 0, 0, 0), (4, 2, 2, 1), (1, 0, 2, 0), (3, 2, 0, 2)]:
        close(delta[o, c, u, v], product[o * 3 + u, c * 3 + v], 1e-14)
    close(delta.permute(0, 2, 1, 3).reshape(15, 9), product, 1e-14)


def test_view_scrambles_channels_as_loralib_does_and_can_be_undone() -> None:
    model = random_layer(nn.Conv2d(3, 5, 3), r=1, alpha=0.5, reshape="view")
    p = own(model)
    product = 0.5 * p["lora_B"] @ p["lora_A"]
    delta = change(model)
    close(delta.reshape(15, 9), product, 1e-14)
    for o, c, u, v in [(0, 0, 0, 0), (4, 2, 2, 1), (1, 0, 2, 0), (3, 2, 0, 2)]:
        channel, row = divmod(u * 3 + c, 3)
        close(product[o * 3 + u, c * 3 + v], delta[o, channel, row, v], 1e-14)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_checkpoint_of_loralib_computes_the_same(groups: int) -> None:
    """Its ``ConvLoRA`` adds ``(lora_B @ lora_A).view(weight.shape) * alpha / r`` to the kernel that the layer uses."""
    r, alpha, k = 2, 3, 3
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, k, padding=1, stride=2, groups=groups).double()
    saved = {
        "lora_A": torch.randn(r * k, 4 * k, dtype=torch.float64),
        "lora_B": torch.randn(6 // groups * k, r * k, dtype=torch.float64),
    }
    model = Host(conv)
    lk.attach(model, lk.LoRAC(r=r, alpha=alpha, reshape="view"), ["layer"])
    assert {n: p.shape for n, p in own(model).items()} == {n: t.shape for n, t in saved.items()}
    with torch.no_grad():
        for name, p in own(model).items():
            p.copy_(saved[name])
    W = conv.weight + (saved["lora_B"] @ saved["lora_A"]).view(conv.weight.shape) * (alpha / r)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    close(model(x), conv._conv_forward(x, W, conv.bias), 1e-12)


@pytest.mark.parametrize(
    ("conv", "rank", "expected"),
    [
        (nn.Conv1d(4, 6, 3), "r*k", {"lora_A": (2, 12), "lora_B": (6, 2)}),
        (nn.Conv2d(4, 6, (3, 2)), "r*k", {"lora_A": (6, 8), "lora_B": (18, 6)}),
        (nn.Conv2d(4, 6, (3, 2)), "r", {"lora_A": (2, 8), "lora_B": (18, 2)}),
        (nn.Conv2d(4, 6, 1), "r*k", {"lora_A": (2, 4), "lora_B": (6, 2)}),
        (nn.Conv3d(4, 6, (2, 3, 3)), "r*k", {"lora_A": (4, 36), "lora_B": (12, 4)}),
        (nn.Conv2d(4, 6, 3, groups=2), "r*k", {"lora_A": (2, 6, 6), "lora_B": (2, 9, 6)}),
    ],
    ids=["1d", "2d", "2d-r", "1x1", "3d", "groups"],
)
def test_kernels_of_every_dimension(conv: nn.Module, rank: str, expected: dict[str, tuple[int, ...]]) -> None:
    model = Host(conv)
    lk.attach(model, lk.LoRAC(r=2, rank=rank), ["layer"])
    assert {n: tuple(p.shape) for n, p in own(model).items()} == expected


def test_the_start() -> None:
    model = Host(nn.Conv2d(100, 60, 3))
    lk.attach(model, lk.LoRAC(), ["layer"], seed=0)
    A: Tensor = own(model)["lora_A"]
    assert not own(model)["lora_B"].any()
    assert (
        0.99 * 300**-0.5 < float(A.detach().abs().max()) <= 300**-0.5
    )  # fan-in: columns of A, as in loralib
    assert lk.LoRAC().alpha / lk.LoRAC().r == 2


# ---- what it adapts --------------------------------------------------------------------------------------------------
class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, 4), nn.Conv2d(4, 4, 3)
        self.deconv, self.fc = nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4)


def test_convolutions_are_its_default() -> None:
    report = lk.attach(Mixed(), lk.LoRAC(r=1))
    assert [site.path for site in report.sites] == ["conv"]


@pytest.mark.parametrize("name", ["fc", "embed"])
def test_other_layers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedTargetError, match="use LoRA for other layers"):
        lk.attach(Mixed(), lk.LoRAC(r=1), [name])


def test_no_convolution_at_all() -> None:
    with pytest.raises(UnmatchedTargetError, match="'all-conv' found no convolution"):
        lk.attach(Host(nn.Linear(3, 3)), lk.LoRAC(r=1))


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(4, 6, 3)], ids=["1d", "3x2", "3d"]
)
def test_the_view_is_for_kernels_that_loralib_has(conv: nn.Module) -> None:
    with pytest.raises(UnsupportedTargetError, match="square two-dimensional"):
        lk.attach(Host(conv), lk.LoRAC(r=1, reshape="view"), ["layer"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "rk"}, "No rank of LoRA-C"),
        ({"reshape": "veiw"}, "Did you mean 'view'"),
        ({"r": 0}, "at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.LoRAC(**settings)


def test_a_rank_that_the_matrix_cannot_have() -> None:
    lk.attach(Host(nn.Conv2d(3, 64, 3)), lk.LoRAC(r=3), ["layer"])
    with pytest.raises(ConfigError, match=r"r=4 makes a product of rank 12.*192 x 9"):
        lk.attach(Host(nn.Conv2d(3, 64, 3)), lk.LoRAC(r=4), ["layer"])


def test_shapes_come_from_the_facts_alone() -> None:
    assert lk.LoRAC(r=1).shapes(Shape("conv", out=64, in_=64 * 9, kernel=(3, 3))) == {
        "lora_A": (3, 192),
        "lora_B": (192, 3),
    }
