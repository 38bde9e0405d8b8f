"""Images with labels, from npz files or folders of pictures, to the tensors of a batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.errors import DataError, MissingDependencyError, listing, near_matches
from lorakit.models.image_classifier import ImageInput
from lorakit.train.row_set import NamedSet, Row
from lorakit.train.tables import check_file
from lorakit.train.task_data import ImageData

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImage:
    """An image and what it shows.

    Attributes:
        place: File, and the row in it.
        pixels: ``(channels, height, width)`` of 0 to 255.
        label: The name of its class.
    """

    place: str
    pixels: Tensor
    label: str


@dataclass(frozen=True)
class ImageRow:
    """One row as the model sees it.

    Attributes:
        id: Its place.
        pixels: ``(channels, height, width)`` of 0 to 255.
        labels: The number of its class, alone.
    """

    id: str
    pixels: Tensor
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """One image."""
        return 1

    @property
    def texts(self) -> Sequence[Row]:
        """Itself."""
        return (self,)

    @property
    def written(self) -> int:
        """None."""
        return 0

    @property
    def content(self) -> Any:
        """A hash of the pixels, and the label."""
        return [hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest(), self.labels]


@dataclass(frozen=True, kw_only=True)
class ImageSet(NamedSet[ImageRow]):
    """All images of a split; the names are those of the classes."""

    @property
    def taught(self) -> str:
        """The share of each class."""
        return f"{len(self.names)} classes: {self.shares(row.labels[0] for row in self.rows)}"

    def __str__(self) -> str:
        sizes = Counter(tuple(row.pixels.shape) for row in self.rows)
        (channels, height, width), _ = sizes.most_common(1)[0]
        most = f"{height}x{width}, {channels} channel{'s' if channels > 1 else ''}"
        return f"{len(self.rows):,} images ({most if len(sizes) == 1 else f'mostly {most}'}), {self.taught}"


@dataclass(frozen=True)
class ImageCollator:
    """Images of one size, normalised.

    Attributes:
        size: Height and width that they are brought to.
        channels: That the model wants.
        mean: Subtracted from each channel.
        std: What each is divided by.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padded: ClassVar[bool] = True

    def __call__(self, rows: Sequence[ImageRow]) -> dict[str, Tensor]:
        """``pixel_values`` ``(rows, channels, size, size)`` and ``labels`` ``(rows,)``."""
        return {
            "pixel_values": torch.stack([self._pixels(row) for row in rows]),
            "labels": torch.tensor([row.labels[0] for row in rows]),
        }

    def _pixels(self, row: ImageRow) -> Tensor:
        x = row.pixels.float() / 255
        if x.shape[0] == 1 and self.channels == 3:
            x = x.expand(3, -1, -1)
        elif x.shape[0] == 3 and self.channels == 1:
            x = x.mean(0, keepdim=True)
        if x.shape[1:] != (self.size, self.size):
            x = F.interpolate(
                x[None], (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )[0]
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def choose_image_collator(wanted: ImageInput, data: ImageData, rows: Sequence[ImageRow]) -> ImageCollator:
    """How images become what the model wants: as the recipe says, else as the model does.

    Args:
        wanted: The model's wishes.
        data: The recipe's section.
        rows: Images, whose size is kept where nobody asks for another.

    Raises:
        DataError: Nobody says how images are normalised, or the numbers do not fit the channels.
    """
    mean, std = data.mean or wanted.mean, data.std or wanted.std
    if mean is None or std is None:
        raise DataError(
            "Nothing says how the model's images are normalised: set data.mean and data.std, a number for each "
            "channel, such as [0.5, 0.5, 0.5]."
        )
    if not len(mean) == len(std) == wanted.channels:
        raise DataError(
            f"The model reads {wanted.channels} channels; data.mean has {len(mean)} numbers and data.std {len(std)}."
        )
    size = data.size or wanted.size or max(max(row.pixels.shape[1:]) for row in rows)
    return ImageCollator(size, wanted.channels, tuple(mean), tuple(std))


def load_images(path: Path, data: ImageData, most: int | None) -> list[LabelledImage]:
    """The images of a split.

    Raises:
        DataError: Something is missing, empty or malformed; the message names the row.
    """
    found = list(_folder(path, most) if path.is_dir() else _arrays(path, data, most))
    if not found:
        raise DataError(f"{path} holds no images.")
    return found


def class_names(images: Sequence[LabelledImage], data: ImageData) -> tuple[str, ...]:
    """The classes: those of the recipe, else those that occur, numbers by size and words by the alphabet.

    Raises:
        DataError: There is only one.
    """
    if data.classes is not None:
        return tuple(data.classes)
    names = {image.label for image in images}
    if len(names) < 2:
        raise DataError(
            f"All {len(images)} images are of the class {min(names)!r}: there is nothing to tell apart."
        )
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=int if numbers else str))


def image_rows(images: Sequence[LabelledImage], names: Sequence[str], *, flip: bool = False) -> ImageSet:
    """Rows of images.

    Args:
        images: At least one.
        names: The classes in the order of the logits.
        flip: Whether each image is followed by its mirror image.

    Raises:
        DataError: A class is not among ``names``.
    """
    number = {name: i for i, name in enumerate(names)}
    rows = []
    for image in images:
        if image.label not in number:
            raise DataError(
                f"{image.place}: the class {image.label!r} is none of those of the training data."
                f"{near_matches(image.label, names)} Those are: {listing(names, most=20)}."
            )
        labels = (number[image.label],)
        rows.append(ImageRow(image.place, image.pixels, labels))
        if flip:
            rows.append(ImageRow(f"{image.place}, mirrored", image.pixels.flip(2), labels))
    return ImageSet(rows=tuple(rows), longest=1, names=tuple(names))


def _arrays(path: Path, data: ImageData, most: int | None) -> Iterator[LabelledImage]:
    import numpy

    check_file(path)
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            there = set(arrays.files)
            if not {"x", "y"} <= there:
                raise DataError(f"{path} holds the arrays {listing(sorted(there))}: expected x and y.")
            x, y = arrays["x"][:most], arrays["y"][:most]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no npz file of arrays: {error}.") from error
    if x.dtype != numpy.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: x must be uint8 (rows, height, width) or (rows, height, width, channels); "
            f"it is {x.dtype} {x.shape}."
        )
    if y.shape != (len(x),) or not numpy.issubdtype(y.dtype, numpy.integer):
        raise DataError(f"{path}: y must be {len(x)} whole numbers; it is {y.dtype} {y.shape}.")
    for i, (pixels, number) in enumerate(zip(x, y.tolist(), strict=True)):
        place = f"{path}, row {i}"
        if data.classes is not None and not 0 <= number < len(data.classes):
            raise DataError(f"{place}: the class {number}; data.classes names {len(data.classes)}, from 0.")
        image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
        label = str(number) if data.classes is None else data.classes[number]
        yield LabelledImage(place, image.contiguous(), label)


def _folder(path: Path, most: int | None) -> Iterator[LabelledImage]:
    import numpy

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("Reading pictures needs pillow: pip install pillow") from error
    files = [
        file
        for kind in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        for file in sorted(kind.iterdir())
        if file.suffix.lower() in _PICTURES
    ]
    if not files:
        raise DataError(
            f"{path} holds no folders of pictures, one folder for each class ({listing(sorted(_PICTURES))})."
        )
    for file in files[:most]:
        try:
            with Image.open(file) as picture:
                pixels = numpy.array(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{file} is no picture that can be read: {error}.") from error
        yield LabelledImage(
            str(file), torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), file.parent.name
        )
