"""Attentions whose keys and values can be extended, and the module that numbers the positions of their tokens.

An attention is told by what transformers' attentions have in common: a ``forward`` that takes ``attention_mask`` and a
cache (``past_key_values``), to whose ``update`` it hands its keys and values and with whose result it goes on. Some two
hundred of transformers' classes are like that: Llama, Qwen, Mistral, Gemma, GPT-2, OPT, BERT, RoBERTa and their kin.
"""

from __future__ import annotations

from torch import nn

from lorakit.core.target import Shape
from lorakit.core.walk import base_modules
from lorakit.targets.dense import DenseStorage
from lorakit.targets.signature import parameter_names
from lorakit.targets.weightless import WeightlessTarget

ATTENTION, POSITIONS = "attention", "positions"
CACHES = ("past_key_values", "past_key_value", "layer_past")
_KEY_PROJECTIONS = ("k_proj", "key")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")


class AttentionTarget(WeightlessTarget):
    """One attention.

    Attributes:
        heads: Heads of its keys and values, which may be fewer than those of its queries.
        head_width: Width of each.
        backbone: The module that takes the tokens, numbers their positions and contains this attention.
        arguments: The parameters of the attention's ``forward``, in order.
        cache: Which of them is the cache.
    """

    def __init__(
        self, path: str, module: nn.Module, backbone: nn.Module, width: int, head_width: int
    ) -> None:
        super().__init__(path, module, ATTENTION, DenseStorage(), "attention")
        self.shape = Shape("attention", out=width, in_=_hidden_width(module, width))
        self.backbone, self.heads, self.head_width = backbone, width // head_width, head_width
        self.arguments = parameter_names(module)
        self.cache = next(name for name in CACHES if name in self.arguments)


class PositionsTarget(WeightlessTarget):
    """Where a backbone is told the positions of its tokens.

    Attributes:
        arguments: The parameters of its ``forward``, in order.
        room: How many positions have a learned vector; None where positions are computed.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(POSITIONS, backbone, POSITIONS, DenseStorage(), "inputs")
        self.shape = Shape("model", out=0, in_=0)
        self.arguments, self.room = parameter_names(backbone), learned_positions(backbone)


def attentions(model: nn.Module) -> dict[str, AttentionTarget | str]:
    """Every self-attention of a model, by path; the reason instead where its keys and values cannot be extended."""
    modules = dict(base_modules(model))
    return {path: _attention(path, modules) for path, module in modules.items() if _is_attention(module)}


def attention_target(model: nn.Module, path: str) -> AttentionTarget | str | None:
    """The attention at a path, the reason when it cannot be extended, None when there is none."""
    modules = dict(base_modules(model))
    return _attention(path, modules) if path in modules and _is_attention(modules[path]) else None


def _is_attention(module: nn.Module) -> bool:
    """A self-attention: its class says that it attends, and it makes heads; a block around it makes none."""
    name = type(module).__name__.lower()
    if "attention" not in name or "cross" in name or "pooling" in name:
        return False
    makes_heads = any(hasattr(module, fact) for fact in (*_HEAD_WIDTHS, "num_heads", "n_heads"))
    return makes_heads and not getattr(module, "is_cross_attention", False)


def _attention(path: str, modules: dict[str, nn.Module]) -> AttentionTarget | str:
    module = modules[path]
    names = parameter_names(module)
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention takes its keys as they come, with no cache through which more could be added"
    alibi = "alibi" in names and getattr(getattr(module, "config", None), "alibi", True)
    if alibi or "position_bias" in names:
        return f"{kind} adds a bias for each pair of positions, and there is none for added keys"
    if not any(name in names for name in CACHES) or "attention_mask" not in names:
        return f"{kind} takes no cache, through which keys and values could be added"
    if any(getattr(module, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim")):
        return f"{kind} keeps keys and values of unequal widths, compressed together"
    if getattr(module, "is_kv_shared_layer", False):
        return f"{kind} takes the keys and values of an earlier layer here, which is to be adapted instead"
    backbone = backbone_of(path, modules)
    if backbone is None:
        return "no module around it takes `inputs_embeds` and `attention_mask`, as those of transformers do"
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return "it belongs to an encoder-decoder, whose two caches are not extended"
    width, head_width = _widths(module)
    if not width or not head_width or width % head_width:
        return (
            f"the width of the keys of {kind} is not known: neither a key projection nor its config says it"
        )
    return AttentionTarget(path, module, backbone, width, head_width)


def backbone_of(path: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The innermost module above a path that takes embedded tokens and a mask, if there is one."""
    while path:
        path = path.rpartition(".")[0]
        if is_backbone(modules[path]):
            return modules[path]
    return None


def learned_positions(backbone: nn.Module) -> int | None:
    """How many positions have a learned vector; None where positions are computed."""
    for owner in (backbone, backbone._modules.get("embeddings")):
        for name in ("wpe", "position_embeddings", "embed_positions"):
            table = None if owner is None else owner._modules.get(name)
            if isinstance(table, nn.Embedding):
                return table.num_embeddings
    return None


def is_backbone(module: nn.Module) -> bool:
    """Whether a module takes embedded tokens and a mask."""
    names = parameter_names(module)
    return "inputs_embeds" in names and "attention_mask" in names


def _widths(module: nn.Module) -> tuple[int, int]:
    """Width of all key heads together, and of one; 0 for what is not known."""
    config = getattr(module, "config", None)
    head_width = next((width for fact in _HEAD_WIDTHS if (width := getattr(module, fact, 0))), 0)
    for name in _KEY_PROJECTIONS:
        projection = module._modules.get(name)
        if isinstance(getattr(projection, "out_features", None), int):
            return projection.out_features, int(head_width)  # type: ignore[union-attr, return-value]
    told = ((module, "num_kv_heads"), (config, "num_key_value_heads"), (config, "num_attention_heads"))
    heads = next((number for owner, fact in told if (number := getattr(owner, fact, 0))), 0)
    return int(heads) * int(head_width), int(head_width)


def _hidden_width(module: nn.Module, width: int) -> int:
    hidden = getattr(getattr(module, "config", None), "hidden_size", None)
    return hidden if isinstance(hidden, int) else width
