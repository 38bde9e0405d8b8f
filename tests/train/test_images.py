"""Images from files to tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from lorakit.errors import DataError
from lorakit.models.image_classifier import ImageInput
from lorakit.train.images import ImageCollator, choose_image_collator, class_names, image_rows, load_images
from lorakit.train.task_data import ImageData


def section(**values: Any) -> ImageData:
    return ImageData.model_validate({"train": "x", **values})


def test_arrays_become_tensors(tmp_path: Path) -> None:
    x = numpy.arange(2 * 4 * 4 * 3, dtype=numpy.uint8).reshape(2, 4, 4, 3)
    numpy.savez(tmp_path / "a.npz", x=x, y=numpy.array([1, 0]))
    data = section(classes=["no", "yes"], flip=True)
    images = load_images(tmp_path / "a.npz", data, None)
    assert [image.label for image in images] == ["yes", "no"]
    rows = image_rows(images, class_names(images, data), flip=True)
    assert [row.labels for row in rows.rows] == [(1,), (1,), (0,), (0,)]
    assert "4 images (4x4, 3 channels)" in str(rows)
    collator = ImageCollator(4, 3, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    batch = collator(rows.rows)
    for channel, (mean, std) in enumerate([(0.5, 0.5), (0.25, 1.0), (0.0, 2.0)]):
        expected = torch.from_numpy((x[0, :, :, channel] / 255 - mean) / std).float()
        torch.testing.assert_close(batch["pixel_values"][0, channel], expected)
        torch.testing.assert_close(batch["pixel_values"][1, channel], expected.flip(1))
    assert rows.rows[0].content != rows.rows[1].content


def test_sizes_and_channels(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.npz", x=numpy.full((2, 4, 6), 255, dtype=numpy.uint8), y=numpy.array([0, 1]))
    images = load_images(tmp_path / "a.npz", section(), None)
    rows = image_rows(images, ("0", "1")).rows
    wanted = ImageInput(8, 3, (0.0,) * 3, (1.0,) * 3)
    batch = choose_image_collator(wanted, section(), rows)(rows)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(batch["pixel_values"], torch.ones(2, 3, 8, 8))
    with pytest.raises(DataError, match=r"reads 3 channels; data\.mean has 1 numbers"):
        choose_image_collator(wanted, section(mean=[0.5], std=[0.5]), rows)


def test_folders_of_pictures(tmp_path: Path) -> None:
    for kind, value in (("dark", 0), ("bright", 255)):
        (tmp_path / kind).mkdir()
        Image.new("L", (5, 3), value).save(tmp_path / kind / "one.png")
    (tmp_path / "dark" / "notes.txt").write_text("not a picture")
    images = load_images(tmp_path, section(), None)
    assert [(image.label, int(image.pixels.max())) for image in images] == [("bright", 255), ("dark", 0)]
    assert images[0].pixels.shape == (3, 3, 5)
    (tmp_path / "dark" / "bad.png").write_text("no")
    with pytest.raises(DataError, match=r"bad\.png is no picture that can be read"):
        load_images(tmp_path, section(), None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": numpy.zeros((2, 4, 4), numpy.float32), "y": numpy.zeros(2, int)}, "x must be uint8"),
        ({"x": numpy.zeros((2, 4, 4, 2), numpy.uint8), "y": numpy.zeros(2, int)}, "x must be uint8"),
        ({"x": numpy.zeros((2, 4, 4), numpy.uint8), "y": numpy.zeros(3, int)}, "y must be 2 whole numbers"),
        ({"x": numpy.zeros((2, 4, 4), numpy.uint8)}, "expected x and y"),
        (
            {"x": numpy.zeros((2, 4, 4), numpy.uint8), "y": numpy.array([0, 7])},
            "the class 7; data.classes names 2",
        ),
    ],
)
def test_arrays_that_are_wrong(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    numpy.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz", section(classes=["a", "b"]), None)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data file"):
        load_images(tmp_path / "a.npz", section(), None)
    (tmp_path / "b.npz").write_text("no")
    with pytest.raises(DataError, match="is no npz file of arrays"):
        load_images(tmp_path / "b.npz", section(), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no folders of pictures"):
        load_images(tmp_path / "empty", section(), None)
