"""The lists of layers, against what is published of the models."""

from __future__ import annotations

import math

import pytest

from lorakit.io.formats.architectures import ARCHITECTURES, sd15, sdxl
from lorakit.io.formats.names import Names


def _beside_the_weights(names: Names) -> int:
    """Biases and norms of a UNet, from its layers: what is missing for its parameter count."""
    total = 2 * 320  # the last norm
    for path, size in names.sizes.items():
        leaf = path.rpartition(".")[2]
        if not path.startswith("unet."):
            continue
        if leaf not in ("to_q", "to_k", "to_v"):
            total += size[0]
        if leaf in ("conv1", "proj_in"):  # the norm in front of it
            total += 2 * size[1]
        if leaf == "conv2":
            total += 2 * size[0]
        if path.endswith("attn1.to_q"):  # the three norms of a transformer block
            total += 3 * 2 * size[1]
    return total


@pytest.mark.parametrize(("names", "published"), [(sd15, 859_520_964), (sdxl, 2_567_463_684)])
def test_parameters_of_the_unet(names, published: int) -> None:
    weights = sum(math.prod(s) for path, s in names().sizes.items() if path.startswith("unet."))
    assert weights + _beside_the_weights(names()) == published


def test_rank_one_of_attention_counts_as_published() -> None:
    leaves = ("to_q", "to_k", "to_v", "to_out.0")
    of_rank_one = sum(sum(s) for path, s in sd15().sizes.items() if path.endswith(leaves))
    assert of_rank_one == 199_296


def test_first_names_of_sdxl() -> None:
    other = sdxl().other
    assert other["unet.down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert other["unet.mid_block.attentions.0.proj_out"] == "middle_block.1.proj_out"
    assert other["unet.mid_block.resnets.1.conv1"] == "middle_block.2.in_layers.2"
    assert other["unet.up_blocks.0.attentions.2.proj_in"] == "output_blocks.2.1.proj_in"
    assert other["unet.up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert other["unet.down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert other["unet.up_blocks.2.resnets.2.conv_shortcut"] == "output_blocks.8.0.skip_connection"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_found_by_its_flattened_name(name: str) -> None:
    names = ARCHITECTURES[name]()
    assert all(names.path(names.flat(path, "")) == path for path in names.sizes)
