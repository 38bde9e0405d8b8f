"""Reading a transformers decoder of the Llama kind into the blocks of the compiled step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.ops.native.decoder import DecoderLayer, DecoderSizes, Kernel, PackedWeight
from lorakit.ops.native.pages import Together
from lorakit.serve.kv import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Storage = Literal["fp32", "int8"]

# What these compute beside the parts below is nothing. Each is compared with its own forward before it is used.
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Place:
    """Where a layer of the model went: a weight of the decoder, and a part of it."""

    weight: int
    part: int


@dataclass
class NativeModel:
    """A model in blocks.

    Attributes:
        sizes: Its sizes.
        layers: Its layers.
        norm: The weight of the last norm.
        head: The output layer.
        places: Path of each linear layer to where it went.
        lookup: Path of the embedding.
    """

    sizes: DecoderSizes
    layers: list[DecoderLayer]
    norm: Tensor
    head: PackedWeight
    places: dict[str, Place]
    lookup: str


def why_not(model: PreTrainedModel, kernel: Kernel) -> str | None:
    """Why the compiled step cannot run a model; None when it can."""
    config = model.config
    if config.model_type not in KINDS:
        return f"{type(model).__name__} is not of the kinds {', '.join(KINDS)}"
    if next(model.parameters()).device.type != "cpu":
        return "the model is not on the CPU"
    if getattr(config, "hidden_act", None) not in _GATES:
        return f"its gate is {getattr(config, 'hidden_act', None)!r}, not one of {', '.join(_GATES)}"
    attention = model.model.layers[0].self_attn
    head_dim = attention.head_dim
    if head_dim % kernel.width or head_dim > 512:
        return f"its heads have width {head_dim}, which is no multiple of {kernel.width} up to 512"
    if BLOCK % kernel.width:
        return f"the vectors of this processor hold {kernel.width} numbers, which does not divide {BLOCK}"
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    if windowed and window < config.max_position_embeddings:
        return f"its attention has a sliding window of {window} tokens"
    odd = [name for name, module in model.named_modules() if _is_quantized(module)]
    return f"{odd[0]!r} is not a plain linear layer" if odd else None


def _is_quantized(module: nn.Module) -> bool:
    return module.__class__.__name__.startswith("Linear") and type(module) is not nn.Linear


def read_model(model: PreTrainedModel, kernel: Kernel, storage: Storage) -> NativeModel:
    """Put a model, for which `why_not` found nothing, into blocks.

    Raises:
        ModelError: Its layers have parts that are not known.
    """
    config: Any = model.config
    gemma = config.model_type == "gemma"
    pages = Together()
    layers: list[DecoderLayer] = []
    places: dict[str, Place] = {}
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        path = f"model.layers.{i}"
        groups = (
            (f"{path}.self_attn", attention, _QKV),
            (f"{path}.self_attn", attention, ("o_proj",)),
            (f"{path}.mlp", mlp, _GATE_UP),
            (f"{path}.mlp", mlp, ("down_proj",)),
        )
        weights = []
        for site, (prefix, owner, names) in enumerate(groups):
            parts = [getattr(owner, name) for name in names]
            pairs = [(part.weight, part.bias) for part in parts]
            weights.append(
                PackedWeight(pairs, kernel.width, storage, alternating=names == _GATE_UP, pages=pages)
            )
            for part, name in enumerate(names):
                places[f"{prefix}.{name}"] = Place(4 * i + site, part)
        norms = [_norm(layer.input_layernorm, gemma), _norm(layer.post_attention_layernorm, gemma)]
        heads = [_norm(getattr(attention, name, None), gemma) for name in ("q_norm", "k_norm")]
        input_norm, post_norm = norms
        assert input_norm is not None
        assert post_norm is not None
        qkv, out, gate_up, down = weights
        layers.append(DecoderLayer(qkv, out, gate_up, down, input_norm, post_norm, *heads))
        _check_parts(layer, path, places)
    first, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    head_dim = first.head_dim
    head = model.lm_head
    sizes = DecoderSizes(
        hidden=config.hidden_size,
        heads=first.q_proj.out_features // head_dim,
        kv_heads=first.k_proj.out_features // head_dim,
        head_dim=head_dim,
        middle=mlp.down_proj.in_features,
        vocabulary=head.out_features,
        epsilon=config.rms_norm_eps,
        scale=first.scaling,
        gate=_GATES[config.hidden_act],  # type: ignore[arg-type]
    )
    last = _norm(model.model.norm, gemma)
    assert last is not None
    places["lm_head"] = Place(4 * len(layers), 0)
    packed_head = PackedWeight([(head.weight, head.bias)], kernel.width, storage, pages=pages)
    return NativeModel(sizes, layers, last, packed_head, places, "model.embed_tokens")


def _norm(module: nn.Module | None, gemma: bool) -> Tensor | None:
    if module is None:
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.detach().to("cpu", torch.float32)
    return weight + 1 if gemma else weight.clone()


def _check_parts(layer: nn.Module, path: str, places: dict[str, Place]) -> None:
    """Every parameter of a layer must have gone somewhere."""
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    for name, _ in layer.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in norms and f"{path}.{owner}" not in places:
            raise ModelError(f"{path}.{name} is a part that the compiled step does not know.")
