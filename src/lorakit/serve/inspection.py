"""Finding out whether a transformers model can be served: how its attention is called, and whether packing is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.serve.kv import KVArena
from lorakit.serve.ragged import NAME, AttentionCall, ragged_step, register
from lorakit.serve.runner import Piece, Segment, StepBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.serve.transformers_runner import TransformersRunner
    from lorakit.serve.versions import AdapterVersion

_LONGEST_PROBE = 640
_TOLERANCE = 1e-3  # of the largest logit; float32 packs to about 1e-6
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Layout:
    """What a model's keys and values look like.

    Attributes:
        layers: Layers of attention.
        kv_heads: Heads of keys and values.
        head_dim: Their width.
        context: The most tokens of one text.
        windows: The sliding window of each layer; None sees everything.
        stock: The attention implementation that the model came with.
        probe_tokens: Tokens of a text that reaches over every window that is short enough to be tried.
    """

    layers: int
    kv_heads: int
    head_dim: int
    context: int
    windows: tuple[int | None, ...]
    stock: str
    probe_tokens: int


def inspect_model(model: PreTrainedModel) -> Layout:
    """Switch a model to the packed attention, and see how its layers call it.

    Raises:
        ModelError: It cannot be served, and why.
    """
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; only decoders can be served.")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no output layer over tokens; load it as a causal language model.")
    stock = getattr(config, "_attn_implementation", None) or "eager"
    register()
    try:
        model.set_attn_implementation(NAME)
        calls = _attention_calls(model)
    except ModelError:
        model.set_attn_implementation(stock)
        raise
    except Exception as error:
        raise ModelError(
            f"{name} does not let its attention be chosen, which packing many requests into one row needs: {error}"
        ) from error
    try:
        _check_calls(name, config, calls)
    except ModelError:
        model.set_attn_implementation(stock)
        raise
    windows = tuple(call.window for call in sorted(calls))
    shortest = min((w for w in windows if w is not None and w + 16 <= _LONGEST_PROBE), default=16)
    layout = calls[0]
    context = context_of(config)
    return Layout(
        len(calls), layout.kv_heads, layout.key_width, context, windows, stock, min(shortest + 16, context)
    )


@torch.inference_mode()
def _attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    row = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with ragged_step((), calls):
        model(input_ids=row, position_ids=torch.tensor([[0, 1]], device=row.device), use_cache=False)
    return calls


def _check_calls(name: str, config: Any, calls: list[AttentionCall]) -> None:
    if not calls:
        raise ModelError(
            f"{name} does not let its attention be chosen (it never calls transformers' attention interface), which "
            "packing many requests into one row needs. It cannot be served."
        )
    layers = sorted(call.layer for call in calls)
    declared = getattr(config.get_text_config(), "num_hidden_layers", len(layers))
    if layers != list(range(declared)):
        named = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()))
        raise ModelError(
            f"{name} has {declared} layers, of which attention ran in {len(set(layers))}"
            f"{f' (its layers are {named})' if named else ''}: what the others remember of a text is not a key and a "
            "value for each token. It cannot be served."
        )
    shapes = {(call.kv_heads, call.key_width, call.value_width) for call in calls}
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        raise ModelError(
            f"The layers of {name} have keys and values of different sizes (heads, key width, value width): "
            f"{sorted(shapes)}. One KV cache cannot hold them; it cannot be served."
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelError(f"{name} has layers of the kind {sorted(odd)}, which cannot be served.")
    if "sliding_attention" in kinds and all(call.window is None for call in calls):
        raise ModelError(
            f"{name} has sliding windows, but its attention is not told how long they are. It cannot be served."
        )


def context_of(config: Any) -> int:
    """The most tokens of a text whose positions do not depend on how long the others in the row are."""
    text = config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 0)
    if not longest:
        raise ModelError("The model's config does not say how long a text may be (max_position_embeddings).")
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(part.get("rope_type") in ("dynamic", "longrope") for part in each):
        # These turn a text's positions differently once the longest of the row exceeds the original length.
        original = [part.get("original_max_position_embeddings") for part in each]
        longest = min([longest, *(int(n) for n in original if n)])
    return longest


def probe_texts(tokens: int, vocabulary: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two random texts of ``tokens`` and half as many tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(vocabulary, (n,), generator=generator) for n in (tokens, tokens // 2))
    return long.to(device), short.to(device)


def packed_logits(
    step: Callable[[StepBatch], Tensor], arena: KVArena, texts: tuple[Tensor, Tensor]
) -> Tensor:
    """The last logits ``(2, vocabulary)`` of two texts in one packed row, of which the first comes in two pieces."""
    long, short = texts
    slabs = arena.reserve(len(long)), arena.reserve(len(short))
    assert slabs[0] is not None
    assert slabs[1] is not None
    cut, rest = len(long) // 3, len(long) - len(long) // 3
    total, positions = rest + len(short), torch.arange(len(long), device=long.device)
    first = StepBatch(
        long[:cut],
        positions[:cut],
        [Segment(0, cut, None)],
        [Piece(0, cut, 0, slabs[0])],
        positions[cut - 1 : cut],
    )
    second = StepBatch(
        torch.cat([long[cut:], short]),
        torch.cat([positions[cut:], positions[: len(short)]]),
        [Segment(0, total, None)],
        [Piece(0, rest, cut, slabs[0]), Piece(rest, total, 0, slabs[1])],
        torch.tensor([rest - 1, total - 1], device=long.device),
    )
    step(first)
    found = step(second)
    slabs[0].free()
    slabs[1].free()
    return found


@torch.inference_mode()
def own_logits(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """The last logits of each text, from the model itself."""
    return [model(input_ids=text[None], use_cache=False).logits[0, -1].float() for text in texts]


def check_against_stock(runner: TransformersRunner, scratch: KVArena) -> int:
    """Run two texts packed and in chunks, and compare with the model's own attention; returns the vocabulary.

    Raises:
        ModelError: The logits differ: the model does something with a text that packing does not keep.
    """
    model, layout = runner.model, runner.layout
    first = next(model.parameters())
    texts = probe_texts(layout.probe_tokens, int(model.get_output_embeddings().weight.shape[0]), first.device)
    try:
        model.set_attn_implementation("eager")
        own = own_logits(model, texts)
    finally:
        model.set_attn_implementation(NAME)
    packed = packed_logits(runner.step, scratch, texts)
    tolerance = _TOLERANCE if first.element_size() >= 4 else _HALF_TOLERANCE
    for found, want in zip(packed, own, strict=True):
        off = off_by(found, want)
        if off > tolerance:
            model.set_attn_implementation(layout.stock)
            raise ModelError(
                f"{type(model).__name__} gives other logits when two texts are packed into one row (off by {off:.1e} "
                "of the largest): it mixes tokens outside its attention, or weighs keys by their distance (ALiBi). It "
                "cannot be served."
            )
    return int(packed.shape[-1])


def check_routing(run: Callable[[StepBatch], Tensor], scratch: KVArena, version: AdapterVersion) -> bool:
    """Whether an adapter or the base gives something else when both are in one row than each alone.

    Raises:
        LorakitError: They cannot even be run in one row.
    """
    device = scratch.keys.device
    row, last = torch.arange(3, device=device), torch.tensor([2], device=device)
    slabs = [slab for slab in (scratch.reserve(3), scratch.reserve(3)) if slab is not None]
    try:
        wanted = [
            run(StepBatch(row, row, [Segment(0, 3, of)], [Piece(0, 3, 0, slab)], last))[0]
            for of, slab in zip((None, version), slabs, strict=True)
        ]
        pieces = [Piece(0, 3, 0, slabs[0]), Piece(3, 6, 0, slabs[1])]
        both, lasts = torch.cat([row, row]), torch.tensor([2, 5], device=device)
        found = run(StepBatch(both, both, [Segment(0, 3, None), Segment(3, 6, version)], pieces, lasts))
    finally:
        for slab in slabs:
            slab.free()
    return any(off_by(f, w) > _HALF_TOLERANCE for f, w in zip(found, wanted, strict=True))


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest number; NaN counts as infinitely far."""
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    return off if off == off else float("inf")
