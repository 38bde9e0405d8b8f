"""ResNets for CIFAR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import ModelError
from lorakit.models.cifar_resnet import Block, CifarResNet, load_cifar_resnet


@pytest.mark.parametrize(("blocks", "parameters"), [(3, 269_722), (9, 853_018)])
def test_sizes_are_those_of_the_paper(blocks: int, parameters: int) -> None:
    """Table 6: 0.27M for ResNet-20 and 0.85M for ResNet-56."""
    model = CifarResNet(blocks, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)


def test_the_shortcut_of_a_widening_block_adds_no_weights() -> None:
    block = Block(4, 8).eval()
    with torch.no_grad():
        for convolution in (block.conv1, block.conv2):
            convolution.weight.zero_()
    x = torch.rand(1, 4, 6, 6)
    y = block(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_a_file_tells_its_depth(tmp_path: Path) -> None:
    model = CifarResNet(2, 5)
    save_file(model.state_dict(), tmp_path / "r.safetensors")
    again, fresh = load_cifar_resnet(tmp_path / "r.safetensors")
    assert not fresh
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)
    other, fresh = load_cifar_resnet(tmp_path / "r.safetensors", 3, seed=1)
    assert fresh
    assert other.linear.out_features == 3
    assert torch.equal(
        other.linear.weight, load_cifar_resnet(tmp_path / "r.safetensors", 3, seed=1)[0].linear.weight
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="holds no ResNet for CIFAR"):
        load_cifar_resnet(tmp_path / "a.safetensors")
    state = CifarResNet(1, 2).state_dict()
    del state["layer2.0.bn1.weight"]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"another network .*layer2\.0\.bn1\.weight"):
        load_cifar_resnet(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_text("no")
    with pytest.raises(ModelError, match="cannot be read"):
        load_cifar_resnet(tmp_path / "c.safetensors")
