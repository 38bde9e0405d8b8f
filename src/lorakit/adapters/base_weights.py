"""The base weights of an adapter's targets, read from a checkpoint when they are asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from lorakit.core import AdapterState, Shape
from lorakit.core.selection import split_part
from lorakit.errors import ConfigError

_ROWS = re.compile(r"(\d+):(\d+)")
_THIRDS = ("q", "k", "v")


class BaseWeights(Mapping[str, Tensor]):
    """Target path to base weight as the stack ``(*batch, out, in)`` that a method sees.

    A target's tensor has its path, or that without or with a prefix: ``encoder.layer.0`` is found for
    ``bert.encoder.layer.0`` and the other way round.

    Attributes:
        missing: Targets that the checkpoint has no weight for, to the reason.

    Args:
        checkpoint: Parameter name to tensor, such as `lorakit.io.checkpoint.Checkpoint`.
        state: The adapter.
        transposed: A regular expression for the linear layers that are stored as ``(in, out)``, where the size does not
            tell (`lorakit.adapters.checkpoints.CONV1D` for GPT-2's family).
    """

    def __init__(
        self, checkpoint: Mapping[str, Tensor], state: AdapterState, *, transposed: str | None = None
    ) -> None:
        self._checkpoint, self._shapes = checkpoint, state.spec.shapes
        self._transposed = re.compile(transposed) if transposed else None
        self._names: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        by_ending: dict[str, list[str]] = {}
        for name in checkpoint:
            by_ending.setdefault(_last_two(name), []).append(name)
        for path, shape in state.spec.shapes.items():
            layer, part = split_part(path)
            name = layer if shape.kind == "parameter" else f"{layer}.weight"
            found = _find(name, checkpoint, by_ending.get(_last_two(name), []))
            if shape.kind not in ("linear", "embedding", "conv", "parameter"):
                self.missing[path] = f"a target of kind {shape.kind} has no weight"
            elif found is None:
                self.missing[path] = f"no tensor {name!r}"
            elif part and not (_ROWS.fullmatch(part) or part in _THIRDS):
                self.missing[path] = f"which rows [{part}] is cannot be told from the checkpoint"
            else:
                self._names[path] = found

    def __getitem__(self, path: str) -> Tensor:
        """The weight of a target.

        Raises:
            ConfigError: It has another size than the adapter was made for.
        """
        stored, shape = self._checkpoint[self._names[path]], self._shapes[path]
        layer, part = split_part(path)
        matrix = self._matrix(stored, shape, layer, part)
        size = (*shape.batch, shape.out, shape.in_)
        if matrix is None or tuple(matrix.shape) != size:
            raise ConfigError(
                f"The adapter was made for {path!r} of {shape}; {self._names[path]!r} in the checkpoint has the size "
                f"{tuple(stored.shape)}. It belongs to another base model."
            )
        return matrix

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _matrix(self, stored: Tensor, shape: Shape, layer: str, part: str) -> Tensor | None:
        size = (*shape.batch, shape.out, shape.in_)
        if shape.kind == "conv" or (shape.kind == "parameter" and not part):
            return stored.reshape(size) if stored.numel() == math.prod(size) else None
        if stored.dim() != 2:
            return None
        if shape.lookup or self._is_transposed(tuple(stored.shape), shape, layer):
            stored = stored.mT
        return _rows(stored, part, shape.out) if part else stored

    def _is_transposed(self, size: tuple[int, ...], shape: Shape, layer: str) -> bool:
        """By the number of inputs, and where both sides have it, by the expression."""
        if size[0] != size[1]:
            return size[1] != shape.in_ and size[0] == shape.in_
        return self._transposed is not None and self._transposed.fullmatch(layer) is not None


def _rows(matrix: Tensor, part: str, out: int) -> Tensor | None:
    """The rows of a slice, given by number, or as q, k or v of three equal parts."""
    if part in _THIRDS:
        at = _THIRDS.index(part) * out
        return matrix[at : at + out] if matrix.shape[0] == 3 * out else None
    first, stop = (int(number) for number in part.split(":"))
    return matrix[first:stop]


def _find(name: str, names: Mapping[str, Tensor], alike: list[str]) -> str | None:
    """The tensor of that name, or the only one whose name or whose ending is the other's ending or name."""
    if name in names:
        return name
    near = [one for one in alike if one.endswith(f".{name}") or name.endswith(f".{one}")]
    return near[0] if len(near) == 1 else None


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])
