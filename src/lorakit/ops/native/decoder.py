"""The compiled step of a decoder of the Llama kind, as Python sees it: weights in blocks, adapters as patches.

The structures mirror `decoder.h`, field by field. Whoever makes one keeps the tensors that it points into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.ops.native.load import LIBRARY, Status, status
from lorakit.ops.native.pages import Together

SITES = ("qkv", "out", "gate_up", "down")
MOST_PARTS = 3
GROUP = 32  # codes of int8 that share a scale
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of numbers in a factor
_SHORT_ROWS = 4  # which part of the scratch


class _Weight(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("blocks", "codes", "scales", "bias", "places")),
        *((name, c_int64) for name in ("in_", "count")),
    ]


class _Factor(Structure):
    _fields_ = [("entries", c_void_p), ("kind", c_int64)]


class _Patch(Structure):
    _fields_ = [
        *((name, _Factor * MOST_PARTS) for name in ("A", "B")),
        ("scale", c_double * MOST_PARTS),
        *((name, c_int64 * MOST_PARTS) for name in ("ranks", "offset")),
        ("rank", c_int64),
        *((name, c_void_p) for name in ("gain", "shift")),
    ]


class _Segment(Structure):
    _fields_ = [("start", c_int64), ("end", c_int64), ("patches", POINTER(_Patch))]


class _Layer(Structure):
    _fields_ = [
        *((name, _Weight) for name in SITES),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    ]


class _Decoder(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("head", _Weight),
        *((name, c_void_p) for name in ("norm", "keys", "values")),
        *(
            (name, c_int64)
            for name in ("n_layers", "hidden", "heads", "kv_heads", "head_dim", "middle", "capacity", "gelu")
        ),
        *((name, c_double) for name in ("epsilon", "scale")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "cos", "sin", "pieces", "last")),
        *((name, POINTER(_Segment)) for name in ("segments", "last_segments")),
        *((name, c_void_p) for name in ("logits", "normed", "qkv", "seen", "acted", "short_rows")),
        *((name, c_void_p) for name in ("columns", "codes", "code_scales", "code_sums")),
        *((name, c_int64) for name in ("rows", "n_pieces", "n_last", "n_segments", "n_last_segments")),
        *((name, c_int64) for name in ("widest_rank", "threads")),
    ]


class Kernel:
    """The functions of a loaded library.

    Attributes:
        width: Outputs in a block of a weight, and tokens in a block of keys.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        library.lorakit_width.restype = c_int64
        self.width: int = library.lorakit_width()
        self.step = library.lorakit_decoder_step
        self.step.restype = None
        self.step.argtypes = [POINTER(_Decoder), POINTER(_Step)]


def kernel() -> Kernel | Status:
    """The compiled step; or, where there is none, why."""
    found = status()
    return found if found.state != "compiled" else Kernel(str(found.folder / LIBRARY))


class PackedWeight:
    """A weight of several parts, as `decoder.h` wants it.

    Args:
        parts: Each a weight ``(out, in)`` and its bias ``(out,)`` or None.
        width: Outputs in a block.
        storage: ``"fp32"``; or ``"int8"``: codes, of which each group of 32 inputs of an output has a scale of its
            own, 127 for its largest entry.
        alternating: Whether the blocks of two parts of the same size take turns: the gate's and what it lets through.
        pages: Where it is put.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Tensor, Tensor | None]],
        width: int,
        storage: Literal["fp32", "int8"] = "fp32",
        alternating: bool = False,
        pages: Together | None = None,
    ) -> None:
        pages = Together(0) if pages is None else pages
        self.width, self.sizes = width, tuple(W.shape[0] for W, _ in parts)
        self.in_ = parts[0][0].shape[1]
        places: list[tuple[int, int, int, int]] = []
        blocks: list[Tensor] = []
        biases: list[Tensor] = []
        column = 0
        for part, (W, bias) in enumerate(parts):
            out = W.shape[0]
            count = -(-out // width)
            for index in range(count):
                places.append((part, index, column + index * width, min(width, out - index * width)))
            fill = count * width - out
            wide = functional.pad(W.detach().to("cpu", torch.float32), (0, 0, 0, fill))
            blocks.append(wide.view(count, width, self.in_))
            b = torch.zeros(out) if bias is None else bias.detach().to("cpu", torch.float32)
            biases.append(functional.pad(b, (0, fill)).view(count, width))
            column += 0 if alternating else out
        self.order = torch.arange(len(places))
        if alternating:
            self.order = torch.arange(len(places)).view(2, -1).T.flatten()
        stacked = torch.cat(blocks)[self.order]  # (count, width, in)
        self.places = torch.tensor([places[i] for i in self.order.tolist()], dtype=torch.int64)
        self.bias = (
            torch.cat(biases)[self.order].contiguous() if any(b is not None for _, b in parts) else None
        )
        self.blocks = self.codes = self.scales = None
        if storage == "fp32":
            self.blocks = pages.copied(stacked.transpose(1, 2))
        else:
            self.codes, self.scales = map(pages.copied, _codes(stacked))
        self.structure = _Weight(
            _pointer(self.blocks),
            _pointer(self.codes),
            _pointer(self.scales),
            _pointer(self.bias),
            _pointer(self.places),
            self.in_,
            len(places),
        )

    def part(self, part: int) -> Tensor:
        """The weight of one part as its products see it, ``(out, in)``: a copy."""
        mine = (self.places[:, 0] == part).nonzero().flatten()
        if self.blocks is not None:
            rows = self.blocks[mine].transpose(1, 2)
        else:
            assert self.codes is not None
            assert self.scales is not None
            codes = self.codes[mine].transpose(1, 2).flatten(2).unflatten(-1, (-1, GROUP))
            rows = (codes * self.scales[mine].mT.unsqueeze(-1)).flatten(2)[..., : self.in_]
        return rows.reshape(-1, self.in_)[: self.sizes[part]]

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds."""
        kept = (self.blocks, self.codes, self.scales, self.bias)
        return sum(t.nbytes for t in kept if t is not None)


@dataclass
class Change:
    """What an adapter does to one part of a weight: ``gain * (W x + scale * B A x) + shift + bias``.

    Attributes:
        A: ``(r, in)``, or None.
        B: ``(out, r)``, or None.
        scale: What the product is multiplied with.
        gain: ``(out,)``, or None.
        shift: ``(out,)``, or None.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    gain: Tensor | None = None
    shift: Tensor | None = None


class Patches:
    """All that an adapter changes: for each weight of a decoder, for each part, a `Change` or None.

    Factors are read where they are: those in float32, bfloat16 or float16 that lie in rows without gaps are not copied.

    Args:
        changes: One entry for each of the weights, in the order of the sites of each layer, then the head.
        weights: These weights.
    """

    def __init__(self, changes: Sequence[Sequence[Change | None]], weights: Sequence[PackedWeight]) -> None:
        self.structures = (_Patch * len(weights))()
        self.tensors: list[Tensor] = []
        self.widest_rank = 0
        self.touches_last = any(change is not None for change in changes[-1])
        for structure, parts, weight in zip(self.structures, changes, weights, strict=True):
            self._fill(structure, parts, weight)

    def _fill(self, structure: _Patch, parts: Sequence[Change | None], weight: PackedWeight) -> None:
        rank = 0
        for part, change in enumerate(parts):
            if change is None or change.A is None or change.B is None:
                continue
            structure.A[part], structure.B[part] = self._factor(change.A), self._factor(change.B)
            structure.scale[part], structure.ranks[part] = change.scale, change.A.shape[0]
            structure.offset[part] = rank
            rank += change.A.shape[0]
        structure.rank = rank
        self.widest_rank = max(self.widest_rank, rank)
        for name, nothing in (("gain", 1.0), ("shift", 0.0)):
            vectors = [None if change is None else getattr(change, name) for change in parts]
            if any(vector is not None for vector in vectors):
                whole = [
                    _vector_in_blocks(torch.full((size,), nothing) if v is None else v, weight.width)
                    for v, size in zip(vectors, weight.sizes, strict=True)
                ]
                setattr(structure, name, _pointer(self._keep(torch.cat(whole)[weight.order].contiguous())))

    def _factor(self, factor: Tensor) -> _Factor:
        kept = factor.detach().to("cpu", factor.dtype if factor.dtype in _KINDS else torch.float32)
        return _Factor(_pointer(self._keep(kept.contiguous())), _KINDS[kept.dtype])

    def _keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor


@dataclass
class DecoderLayer:
    """One layer: weights, and the vectors of its norms: ``(hidden,)``; of q_norm and k_norm ``(head_dim,)``."""

    qkv: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        """Its weights, in the order of `SITES`."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class DecoderSizes:
    """The sizes of a decoder."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    middle: int
    vocabulary: int
    epsilon: float
    scale: float
    gate: Literal["silu", "gelu_tanh"]


@dataclass
class Rows:
    """Neighbouring rows of a step that one adapter changes; ``patches`` is None for the base."""

    start: int
    end: int
    patches: Patches | None


class NativeDecoder:
    """A decoder of the Llama kind: `run` computes one step, in one call that leaves Python alone.

    Args:
        kernel: The compiled functions.
        sizes: Its sizes.
        layers: Its layers.
        norm: The weight of the last norm, ``(hidden,)``.
        head: What makes logits.
        keys: ``(layers, kv_heads, capacity, head_dim)`` in blocks; written to.
        values: ``(layers, kv_heads, capacity, head_dim)``; written to.
    """

    def __init__(
        self,
        kernel: Kernel,
        sizes: DecoderSizes,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        head: PackedWeight,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        self.kernel, self.sizes, self.layers, self.head = kernel, sizes, tuple(layers), head
        self._kept: list[Any] = [norm, keys, values]
        self.weights = (*(weight for layer in layers for weight in layer.weights), head)
        self._layers = (_Layer * len(layers))()
        for structure, layer in zip(self._layers, layers, strict=True):
            for site, weight in zip(SITES, layer.weights, strict=True):
                setattr(structure, site, weight.structure)
            for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
                setattr(structure, name, _pointer(getattr(layer, name)))
        self._decoder = _Decoder(
            ctypes.cast(self._layers, POINTER(_Layer)),
            head.structure,
            _pointer(norm),
            _pointer(keys),
            _pointer(values),
            len(layers),
            sizes.hidden,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.middle,
            keys.shape[2],
            int(sizes.gate == "gelu_tanh"),
            sizes.epsilon,
            sizes.scale,
        )
        self._scratch: tuple[Tensor, ...] = ()

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        pieces: Tensor,
        last: Tensor,
        segments: Sequence[Rows],
        last_segments: Sequence[Rows],
        threads: int,
    ) -> Tensor:
        """One step.

        Args:
            x: Embedded tokens ``(rows, hidden)``; overwritten.
            cos: Of the rotary embedding, ``(rows, head_dim)``.
            sin: The same.
            pieces: ``(requests, 4)`` int64: first row, end, tokens before them, first slot of the request's keys.
            last: Rows whose logits are wanted, int64.
            segments: Adapters over the rows, ascending; rows that none names are the base's.
            last_segments: The same over ``last``.
            threads: How many work on it.

        Returns:
            Logits ``(len(last), vocabulary)``.
        """
        rows, wanted = x.shape[0], last.shape[0]
        widest = max((s.patches.widest_rank for s in segments if s.patches is not None), default=1)
        scratch = self._scratch_for(max(rows, wanted), widest)
        logits = torch.empty(wanted, self.sizes.vocabulary)
        own, own_last = _segments(segments), _segments(last_segments)
        step = _Step(
            _pointer(x),
            _pointer(cos),
            _pointer(sin),
            _pointer(pieces),
            _pointer(last),
            ctypes.cast(own, POINTER(_Segment)),
            ctypes.cast(own_last, POINTER(_Segment)),
            _pointer(logits),
            *(_pointer(t) for t in scratch),
            rows,
            pieces.shape[0],
            wanted,
            len(segments),
            len(last_segments),
            widest,
            threads,
        )
        self.kernel.step(ctypes.byref(self._decoder), ctypes.byref(step))
        return logits

    def _scratch_for(self, rows: int, rank: int) -> tuple[Tensor, ...]:
        """Room for what a step computes on the way, in the order of `decoder.h`; it grows and is kept."""
        s, kept = self.sizes, self._scratch
        if kept and kept[0].shape[0] >= rows and kept[_SHORT_ROWS].shape[1] >= rank:
            return kept
        if kept:
            rows, rank = max(rows, kept[0].shape[0]), max(rank, kept[_SHORT_ROWS].shape[1])
        widest = max(s.hidden, s.middle, s.heads * s.head_dim)
        groups = -(-widest // GROUP)
        self._scratch = (
            torch.empty(rows, s.hidden),
            torch.empty(rows, (s.heads + 2 * s.kv_heads) * s.head_dim),
            torch.empty(rows, s.heads * s.head_dim),
            torch.empty(rows, s.middle),
            torch.empty(rows, rank),
            torch.empty(rows, widest),
            torch.empty(rows, groups * GROUP, dtype=torch.int8),
            torch.empty(rows, groups),
            torch.empty(rows, groups, dtype=torch.int32),
        )
        return self._scratch


def _segments(rows: Sequence[Rows]) -> Any:
    made = (_Segment * max(len(rows), 1))()
    for structure, part in zip(made, rows, strict=False):
        structure.start, structure.end = part.start, part.end
        if part.patches is not None:
            structure.patches = ctypes.cast(part.patches.structures, POINTER(_Patch))
    return made


def _vector_in_blocks(v: Tensor, width: int) -> Tensor:
    count = -(-v.shape[0] // width)
    return functional.pad(v.detach().to("cpu", torch.float32), (0, count * width - v.shape[0])).view(
        count, width
    )


def _codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(count, in / 4, width, 4)`` and scales ``(count, in / 32, width)`` of weights ``(count, width, in)``."""
    count, width, in_ = blocks.shape
    grouped = functional.pad(blocks, (0, -in_ % GROUP)).unflatten(-1, (-1, GROUP))
    scales = grouped.abs().amax(-1) / 127
    safe = torch.where(scales > 0, scales, 1)
    codes = (grouped / safe.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    codes = codes.view(count, width, -1, 4).transpose(1, 2).contiguous()
    return codes, scales.mT.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the compiled step reads whole tensors"
    assert tensor.device.type == "cpu", "the compiled step reads tensors of the CPU"
    return tensor.data_ptr()
