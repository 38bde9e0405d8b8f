"""The residual networks for 32x32 images (ResNet-20, 32, 44, 56, 110) of He et al. 2015 (arXiv 1512.03385, 4.2).

Three groups of blocks of 16, 32 and 64 channels; where the width doubles, the shortcut takes every second pixel and
fills up with channels of zeros (option A), so that it has no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.errors import ModelError, listing

_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if channels == width else 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        more = y.shape[1] - x.shape[1]
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more - more // 2))
        return F.relu(y + short)


class CifarResNet(nn.Module):
    """A residual network for images of 32x32.

    Args:
        blocks: In each of the three groups; the depth is ``6 blocks + 2``.
        classes: Outputs of the last layer.
    """

    base_model_prefix = ""
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=32, num_channels=3)
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        before = _WIDTHS[0]
        for i, width in enumerate(_WIDTHS, 1):
            group = nn.Sequential(*(Block(before if j == 0 else width, width) for j in range(blocks)))
            setattr(self, f"layer{i}", group)
            before = width
        self.linear = nn.Linear(before, classes)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.linear.weight.device

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Logits ``(B, classes)``, under the name that transformers' models have for them.

        Args:
            pixel_values: ``(B, 3, 32, 32)``, normalised.
        """
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        for group in (self.layer1, self.layer2, self.layer3):
            x = group(x)
        return SimpleNamespace(logits=self.linear(x.mean((2, 3))))


def load_cifar_resnet(
    file: str | Path, classes: int | None = None, *, seed: int = 0
) -> tuple[CifarResNet, bool]:
    """A network in ``eval()`` mode from a safetensors file, whose depth its names tell.

    Args:
        file: Names as in https://github.com/akamaster/pytorch_resnet_cifar10, without ``module.``.
        classes: Outputs that are wanted; another number than the file has draws a new last layer.
        seed: Of a new last layer.

    Returns:
        The network, and whether its last layer is new.

    Raises:
        ModelError: The file cannot be read, or holds another network.
    """
    try:
        tensors: Mapping[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error
    blocks = {int(m[1]) for key in tensors if (m := re.match(r"layer1\.(\d+)\.conv1\.weight$", key))}
    if not blocks or "linear.weight" not in tensors:
        raise ModelError(
            f"{file} holds no ResNet for CIFAR (conv1, bn1, layer1..3, linear); it holds "
            f"{listing(sorted(tensors), most=4)}."
        )
    have = tensors["linear.weight"].shape[0]
    fresh = classes is not None and classes != have
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CifarResNet(max(blocks) + 1, classes or have)
    kept = {key: tensor for key, tensor in tensors.items() if not (fresh and key.startswith("linear."))}
    left = model.load_state_dict(kept, strict=False)
    missing = [
        key
        for key in left.missing_keys
        if not key.endswith("num_batches_tracked") and not (fresh and key.startswith("linear."))
    ]
    if missing or left.unexpected_keys:
        odd = missing or left.unexpected_keys
        raise ModelError(f"{file} holds another network than a ResNet for CIFAR: {listing(odd, most=4)}.")
    return model.eval(), fresh
