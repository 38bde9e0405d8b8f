"""How PEFT keeps the tensors of each kind of target: one rule a kind, used for reading, for writing and for the docs.

A rule says under which keys the tensors of a target stand in the file, which size they have there, and how that
layout and the matrix layout ``(*batch, r, in)``, ``(*batch, out, r)`` of `AdapterState` turn into one another.
Source: the formats as PEFT 0.21.2 writes them, each checked against it in ``tests/io/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lorakit.core.target import Shape

PREFIX = "base_model.model."
Sizes = dict[str, tuple[int, ...]]

_FACTORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}


def _reshape(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == size else tensor.reshape(size)


def _same(sizes: Mapping[str, tuple[int, ...]], shape: Shape) -> Sizes:
    return dict(sizes)


@dataclass(frozen=True)
class Rule:
    """One kind of target.

    Attributes:
        name: What the documentation calls it.
        site: Where the keys start, with ``{path}`` for the target's path, or ``{module}`` for its module's.
        keys: Tensor name to the rest of the key.
        configured: Which setting of the configuration names it.
        shape: The facts of a target, from ``A`` and ``B`` as they are in the file.
        sizes: The sizes in the file, from those in memory.
        to_file: A tensor in the file's layout: ``(name, tensor, size in the file)``.
        from_file: The inverse: ``(name, tensor, size in memory)``.
    """

    name: str
    site: str
    keys: Mapping[str, str]
    configured: str
    shape: Callable[[Tensor, Tensor], Shape]
    sizes: Callable[[Mapping[str, tuple[int, ...]], Shape], Sizes] = _same
    to_file: Callable[[str, Tensor, tuple[int, ...]], Tensor] = _reshape
    from_file: Callable[[str, Tensor, tuple[int, ...]], Tensor] = _reshape


# ---- convolutions: A is a kernel, B a 1x1 one, a magnitude lies along the channels of an image
def _conv_shape(A: Tensor, B: Tensor) -> Shape:
    kernel = tuple(A.shape[2:])
    return Shape("conv", out=B.shape[0], in_=A.shape[1] * math.prod(kernel), kernel=kernel)


def _conv_sizes(sizes: Mapping[str, tuple[int, ...]], shape: Shape) -> Sizes:
    ones = (1,) * len(shape.kernel)
    in_file = dict(sizes)
    in_file["lora_A"] = (sizes["lora_A"][0], shape.in_ // math.prod(shape.kernel), *shape.kernel)
    in_file["lora_B"] = (*sizes["lora_B"], *ones)
    if "magnitude" in sizes:
        in_file["magnitude"] = (1, shape.out, *ones)
    return in_file


# ---- bare parameters: the experts' factors side by side
def _expert_sizes(sizes: Mapping[str, tuple[int, ...]], shape: Shape) -> Sizes:
    experts, r = math.prod(shape.batch), sizes["lora_A"][-2]
    return {"lora_A": (experts * r, shape.in_), "lora_B": (shape.out, r * experts)}


def _experts_to_file(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    if name == "lora_B" and tensor.dim() == 3:  # (experts, out, r) -> (out, r, experts)
        tensor = tensor.permute(1, 2, 0)
    return tensor.reshape(size)


def _experts_from_file(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    if name == "lora_B" and len(size) == 3:
        experts, out, r = size
        return tensor.reshape(out, r, experts).permute(2, 0, 1).contiguous()
    return tensor.reshape(size)


def _matrix(kind: str) -> Callable[[Tensor, Tensor], Shape]:
    def shape(A: Tensor, B: Tensor) -> Shape:
        stored = (B.shape[0], A.shape[-1]) if kind == "parameter" else ()
        return Shape(kind, out=B.shape[0], in_=A.shape[-1], stored=stored)  # type: ignore[arg-type]

    return shape


_PLAIN = {k: v for k, v in _FACTORS.items() if k in ("lora_A", "lora_B")}

LINEAR = Rule(
    "linear layer (`nn.Linear`, transformers' `Conv1D`)",
    "{path}",
    _FACTORS,
    "target_modules",
    _matrix("linear"),
)
CONV = Rule(
    "convolution in 1, 2 or 3 dimensions", "{path}", _FACTORS, "target_modules", _conv_shape, _conv_sizes
)
EMBEDDING = Rule(
    "embedding table",
    "{path}",
    {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
    "target_modules",
    _matrix("embedding"),
)
ATTENTION_IN = Rule(
    "`nn.MultiheadAttention`: `in_proj_weight`", "{module}", _PLAIN, "target_modules", _matrix("parameter")
)
ATTENTION_OUT = Rule(
    "`nn.MultiheadAttention`: `out_proj`",
    "{module}.base_layer.out_proj",
    _PLAIN,
    "target_modules",
    _matrix("linear"),
)
PARAMETER = Rule(
    "bare parameter, 2-D or a stack of experts",
    "{module}[.base_layer ...]",
    _PLAIN,
    "target_parameters",
    _matrix("parameter"),
    _expert_sizes,
    _experts_to_file,
    _experts_from_file,
)
LOW_RANK_RULES = (LINEAR, CONV, EMBEDDING, ATTENTION_IN, ATTENTION_OUT, PARAMETER)

TOKEN_ROWS_KEY = "token_adapter.trainable_tokens_delta"

RESERVED = frozenset(
    {"base_layer", "token_adapter", "modules_to_save", "original_module", "_orig_mod", "_fsdp_wrapped_module"}
)
"""Words that PEFT or a wrapper puts into keys; so does every word that starts with ``lora_``."""

HEADS = frozenset({"lm_head", "embed_out", "output_layer", "output_projection"})
TABLES = HEADS | frozenset(
    {
        "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings",
        "embed_in", "shared", "tok_embeddings", "embed_positions",
    }
)  # fmt: skip
"""Names of embedding tables and output heads, which PEFT may save whole without saying so in the configuration."""

PARAMETER_ORDER = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "gate_proj", "gate_up_proj",
    "gate_up_proj_bias", "up_proj", "w1", "v1", "w2", "down_proj", "down_proj_bias",
)  # fmt: skip
"""The order in which transformers' expert layers (and torch's attention) hold their parameters.

PEFT numbers the adapted parameters of a module in the module's order, which a file does not name; this is for reading
one without the model."""


def convention(names: list[str]) -> list[str] | None:
    """Parameters of one module in the order of `PARAMETER_ORDER`; None when the order is not known."""
    if len(names) < 2:
        return list(names)
    if any(name not in PARAMETER_ORDER for name in names):
        return None
    return sorted(names, key=PARAMETER_ORDER.index)


def transposed_pair(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the transposed matrices: ``(B A)ᵀ = Aᵀ Bᵀ``."""
    return B.mT.contiguous(), A.mT.contiguous()


def natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key with ``layers.2`` before ``layers.10``."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")]
