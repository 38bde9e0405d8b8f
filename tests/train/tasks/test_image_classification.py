"""Images: a convolutional network with LoRA-C, a vision transformer with LoRA, and one of the caller's own."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, DataError
from lorakit.models.cifar_resnet import CifarResNet
from lorakit.models.image_classifier import image_head
from lorakit.train import Recipe, evaluate, train
from lorakit.train.progress import PlainProgress
from tests.train.test_trainer import assert_resumes

MakeImages = Callable[..., Recipe]


def pictures(count: int, classes: int = 3) -> dict[str, Any]:
    """Noise with a bright bar whose row tells the class."""
    generator = numpy.random.default_rng(0)
    x = generator.integers(0, 60, (count, 32, 32, 3), dtype=numpy.uint8)
    y = numpy.arange(count, dtype=numpy.uint8) % classes
    for image, number in zip(x, y, strict=True):
        image[int(number) * 10 : int(number) * 10 + 6] = 220
    return {"x": x, "y": y}


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CifarResNet(1, 10)
    file = tmp_path_factory.mktemp("model") / "resnet8.safetensors"
    save_file(model.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(config, add_pooling_layer=False)
    folder = tmp_path_factory.mktemp("model") / "vit"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


@pytest.fixture
def images(tmp_path: Path) -> MakeImages:
    file = tmp_path / "pictures.npz"
    numpy.savez(file, **pictures(48))

    def make(model: Path | str, output: str = "run", **sections: Any) -> Recipe:
        data = {"train": str(file), "valid": str(file), "test": str(file), "max_rows": {"valid": 12}}
        return Recipe.from_mapping(
            {
                "task": "image-classification",
                "model": str(model),
                "output": str(tmp_path / output),
                "adapter": {"r": 4, "alpha": 8},
                **sections,
                "data": {**data, **sections.get("data", {})},
                "train": {"max_steps": 20, "batch_rows": 16, "lr": 1e-2, **sections.get("train", {})},
            }
        )

    return make


def test_lora_c_learns_and_the_base_stays_as_it_is(images: MakeImages, resnet: Path) -> None:
    recipe = images(resnet, adapter={"method": "lora_c", "r": 1, "alpha": 2})
    before = CifarResNet(1, 3).state_dict()
    result = train(recipe)
    assert result.losses[-1] < 0.3 * result.losses[0]
    scored = evaluate(recipe, adapter=result.adapter)
    assert scored.scores["accuracy"] > 0.9
    assert {s.name for s in scored.labels} == {"0", "1", "2"}
    state = lk.read(result.adapter)
    assert {path for path, method in state.spec.methods.items() if method.name == "full"} == {
        "linear.weight", "linear.bias",
    }  # fmt: skip
    assert state.spec.info["labels"] == ["0", "1", "2"]
    # Running statistics are the base's: three classes make a new head, and nothing else is new.
    lk.detach(result.model)
    after = result.model.state_dict()
    assert after.keys() == before.keys()
    from safetensors.torch import load_file

    for name, tensor in load_file(resnet).items():
        if not name.startswith("linear."):
            assert torch.equal(after[name], tensor), name


def test_a_head_of_the_right_size_is_kept(images: MakeImages, resnet: Path) -> None:
    classes = [f"kind {i}" for i in range(10)]
    recipe = images(resnet, data={"classes": classes}, train={"max_steps": 1, "lr": 1e-12})
    result = train(recipe)
    from safetensors.torch import load_file

    assert torch.equal(result.model.linear.weight, load_file(resnet)["linear.weight"])
    assert evaluate(recipe).count == 48
    assert evaluate(recipe, adapter=result.adapter).labels[0].name == "kind 0"


def test_a_vision_transformer_learns_and_peft_reads_it(images: MakeImages, vit: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageClassification

    recipe = images(vit, train={"max_steps": 40})
    result = train(recipe)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert evaluate(recipe, adapter=result.adapter).scores["accuracy"] > 0.9
    bare = AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(bare, str(result.adapter))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, result.model(x).logits, rtol=1e-4, atol=1e-4)


class Own(nn.Module):
    """A network that knows nothing of transformers: it returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(392, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def test_a_network_of_the_callers_own(images: MakeImages) -> None:
    torch.manual_seed(0)
    model = Own().eval()
    recipe = images("mine", data={"mean": [0.5] * 3, "std": [0.5] * 3}, adapter={"method": "lora_c", "r": 1})
    statistics = model.body[1].running_mean.clone()
    result = train(recipe, model=model)  # type: ignore[arg-type]
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert torch.equal(model.body[1].running_mean, statistics)
    scored = evaluate(recipe, model=model)  # type: ignore[arg-type]
    assert scored.scores["accuracy"] > 0.9
    assert image_head(Own(), 3) == ("fc",)
    with pytest.raises(ConfigError, match="Own has no linear layer with 4 outputs"):
        image_head(Own(), 4)


def test_speed_is_told_in_images(images: MakeImages, resnet: Path) -> None:
    lines = io.StringIO()
    result = train(images(resnet, train={"max_steps": 2}), progress=PlainProgress(lines, every_seconds=0))
    assert " images/s " in lines.getvalue()
    assert "token" not in lines.getvalue()
    lines_kept = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    ended = next(line for line in lines_kept if "loss" in line)
    assert ended["images_per_second"] > 0
    assert "tokens_per_second" not in ended
    assert result.plain()["images"] == result.tokens
    assert result.plain()["images_per_second"] > 0


def test_resuming(images: MakeImages, resnet: Path) -> None:
    settings = {"max_steps": 6, "save_every": 2}
    assert_resumes(lambda output: images(resnet, output, train=settings), 3)


def test_what_is_refused(images: MakeImages, vit: Path, resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).write_bytes((vit / file).read_bytes())
    with pytest.raises(DataError, match=r"set data\.mean and data\.std"):
        train(images(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="no images for the valid split"):
        evaluate(images(resnet, data={"valid": None}), split="valid")
    numpy.savez(tmp_path / "four.npz", **pictures(8, 4))
    with pytest.raises(DataError, match="the class '3' is none of those of the training data"):
        train(images(resnet, data={"valid": str(tmp_path / "four.npz")}))


@pytest.mark.model
def test_the_real_resnet_scores_as_published_here(images: MakeImages) -> None:
    data = Path(os.environ.get("LORAKIT_DATA", Path(__file__).parents[4] / "shared" / "data"))
    weights = data / "weights" / "resnet_cifar10" / "resnet20.safetensors"
    if not weights.is_file():
        pytest.skip("the CIFAR weights are not here")
    test = str(data / "images" / "cifar10_test.npz")
    recipe = images(weights, data={"train": None, "valid": None, "test": test, "max_rows": {}})
    assert evaluate(recipe).scores["accuracy"] == pytest.approx(0.804, abs=0.002)
