"""Blocks: any module, or the way from one layer to another, as a target that maps vectors to vectors.

A block is named as its module is (``mlp``). Where a feed-forward is no module of its own, as in BERT, OPT and BART, it
is named after the layer that it lies in: ``encoder.layer.0[ffn]``; and ``layers.0[fc1:fc2]`` is whatever happens from
the input of ``fc1`` to the output of ``fc2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.core.selection import Selector, entry_matches, fullmatch, split_part, unmatched
from lorakit.core.target import Shape, Target
from lorakit.core.walk import base_modules, join, module_at
from lorakit.errors import UnmatchedTargetError, listing, near_matches
from lorakit.targets.dense import DenseStorage
from lorakit.targets.linear import LinearTarget
from lorakit.targets.named_slices import slice_at
from lorakit.targets.recognise import candidates, layer_target
from lorakit.targets.weightless import WeightlessTarget

_NO_BLOCK = {"embedding": "an embedding", "conv": "a convolution"}
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class BlockTarget(WeightlessTarget):
    """What happens from the input of one module to the output of another, or of the same.

    Attributes:
        entry: The module that takes the input.
        module: The module that gives the output.
        last: Its last linear layer.
    """

    def __init__(
        self, path: str, entry: nn.Module, module: nn.Module, first: Target, last: Target, part: str = ""
    ) -> None:
        super().__init__(path, module, "block", DenseStorage(), "block")
        self.entry, self.last, self.part = entry, last, part
        self.shape = Shape("module", out=last.out, in_=first.in_)

    @property
    def stored(self) -> Tensor:
        """The weight of the last layer: for its device and dtype."""
        return self.last.stored


class Family(NamedTuple):
    """How the layers of an architecture are built, as paths below a transformer layer.

    Attributes:
        attention: Output projections of the attentions, of which all count that exist.
        output: The last linear layer of the feed-forward, in the first of these places that exists.
        block: The feed-forward as a module, or as ``first:last`` where it is none.
    """

    attention: tuple[str, ...]
    output: tuple[str, ...]
    block: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    # BERT, RoBERTa, ELECTRA, MiniLM and many more; MPNet
    Family(
        ("attention.output.dense", "crossattention.output.dense", "attention.attn.o"),
        ("output.dense",),
        ("intermediate.dense:output.dense",),
    ),
    # Llama, Mistral, Qwen, Gemma, Phi-3
    Family(("self_attn.o_proj",), ("mlp.down_proj",), ("mlp",)),
    # GPT-2
    Family(("attn.c_proj", "crossattention.c_proj"), ("mlp.c_proj",), ("mlp",)),
    # OPT, BART, mBART, Pegasus, Whisper
    Family(("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",), ("fc1:fc2",)),
    # T5
    Family(
        ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
        ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
        ("layer.1.DenseReluDense", "layer.2.DenseReluDense"),
    ),
    # DistilBERT
    Family(("attention.out_lin",), ("ffn.lin2",), ("ffn",)),
    # GPT-NeoX; BLOOM and Falcon
    Family(("attention.dense", "self_attention.dense"), ("mlp.dense_4h_to_h",), ("mlp",)),
    # ModernBERT
    Family(("attn.Wo",), ("mlp.Wo",), ("mlp",)),
    # MPT
    Family(("attn.out_proj",), ("ffn.down_proj",), ("ffn",)),
    # ALBERT, one layer for all
    Family(("attention.dense",), ("ffn_output",), ("ffn:ffn_output",)),
    # GPT-J
    Family(("attn.out_proj",), ("mlp.fc_out",), ("mlp",)),
    # CLIP; Phi
    Family(("self_attn.out_proj", "self_attn.dense"), ("mlp.fc2",), ("mlp",)),
)
BLOCK_PRESETS = ("all-block-outputs", "all-ffn-outputs", "all-ffn")


def chosen_blocks(model: nn.Module, targets: Selector) -> Iterator[tuple[str, nn.Module, Target | str]]:
    """Path, module, and the target there or the reason why it cannot be one.

    Raises:
        UnmatchedTargetError: Nothing, or one entry of a list, matched nothing.
    """
    modules = {path: module for path, module in base_modules(model) if path}
    if isinstance(targets, str) and targets in BLOCK_PRESETS:
        paths = _preset(model, modules, targets)
    elif isinstance(targets, str):
        paths = fullmatch(targets, modules)
        if not paths:
            hint = near_matches(targets, BLOCK_PRESETS)
            if entry_matches(split_part(targets)[0], modules):
                hint = f" To name modules by their ending, give a list: [{targets!r}]."
            raise UnmatchedTargetError(
                f"The pattern {targets!r} matches no module of this model.{hint} Presets: {', '.join(BLOCK_PRESETS)}."
            )
    elif callable(targets):
        paths = [path for path, module in modules.items() if targets(path, module)]
        if not paths:
            raise UnmatchedTargetError(f"The callable {targets!r} chose none of the {len(modules)} modules.")
    else:
        paths = []
        for entry in targets:
            name, part = (entry, "") if entry_matches(entry, modules) else split_part(entry)
            named = [f"{path}[{part}]" if part else path for path in entry_matches(name, modules)]
            if not named:
                raise unmatched(entry, list(modules), what="module")
            paths += named
    for path in dict.fromkeys(paths):
        target = block_target(model, path)
        assert target is not None
        place = path if isinstance(target, str) else target.path
        yield place, modules[path if path in modules else split_part(path)[0]], target


def block_target(model: nn.Module, path: str) -> Target | str | None:
    """The block at a path, the reason why it cannot be one, or None when there is nothing.

    A linear layer is a block too: the target that other methods have there, or a slice of it.
    """
    name, part = split_part(path)
    try:
        module = module_at(model, name)
    except AttributeError:
        return None
    layer = layer_target(model, name)
    if isinstance(layer, LinearTarget) and layer.binding == "forward":
        return slice_at(model, path, "layer") if part else layer
    if isinstance(layer, LinearTarget) and layer.reader is not module:
        return "its attention reads its weight and never calls it, so it has no output to act on; name the attention"
    if isinstance(layer, Target) and layer.shape.kind in _NO_BLOCK:
        return f"a block maps vectors to vectors, which {_NO_BLOCK[layer.shape.kind]} does not"
    if part:
        return _span(name, module, part)
    if isinstance(module, _NEVER_CALLED):
        return f"a {type(module).__name__} is never called: name what is in it"
    linear = _linear(module)
    return linear if isinstance(linear, str) else BlockTarget(name, module, module, linear[0], linear[-1])


def _span(path: str, layer: nn.Module, part: str) -> Target | str:
    """What happens inside a layer from one of its modules to another."""
    named = part
    if part == "ffn":
        named = next((b for f in FAMILIES for b in f.block if ":" in b and _has(layer, *b.split(":"))), "")
        if not named:
            return (
                "its feed-forward is not known here; give its first and last layer, as in 'layers.0[fc1:fc2]'"
            )
    first, colon, last = named.partition(":")
    if not colon or not _has(layer, first, last):
        inside = listing(p for p, _ in layer.named_modules() if p)
        return f"[{part}] does not name a first and a last module in it, as in [fc1:fc2]; it has: {inside or 'none'}"
    entry, module = layer.get_submodule(first), layer.get_submodule(last)
    into, out_of = _linear(entry), _linear(module)
    if isinstance(into, str) or isinstance(out_of, str):
        return into if isinstance(into, str) else str(out_of)
    return BlockTarget(f"{path}[{part}]", entry, module, into[0], out_of[-1], part)


def _linear(module: nn.Module) -> list[Target] | str:
    """The linear layers of a module, which tell the widths of its input and output; or that it has none."""
    linear = [t for t in candidates(module).values() if isinstance(t, Target) and t.shape.kind == "linear"]
    what = type(module).__name__
    return linear or f"a {what} has no linear layer, so the widths of its input and output are not known"


def _has(layer: nn.Module, *paths: str) -> bool:
    try:
        return all(layer.get_submodule(path) is not None for path in paths)
    except AttributeError:
        return False


def _preset(model: nn.Module, modules: Mapping[str, nn.Module], preset: str) -> list[str]:
    """The paths that a preset means, layer by layer."""
    found: list[str] = []
    for path, module in modules.items():
        family = next((f for f in FAMILIES if _is_of(module, f)), None)
        if family is None:
            continue
        output = next(p for p in family.output if _has(module, p))
        if preset == "all-block-outputs":
            found += [join(path, p) for p in family.attention if _has(module, p)]
        if preset != "all-ffn":
            found.append(join(path, output))
        elif ":" in family.block[0]:
            found.append(f"{path}[ffn]")
        else:
            found.append(next(join(path, p) for p in family.block if _has(module, p)))
    if not found:
        outputs = dict.fromkeys(p for family in FAMILIES for p in family.output)
        raise UnmatchedTargetError(
            f"{preset!r} found no transformer layer of a known architecture in {type(model).__name__} (layers that "
            f"end in {listing(outputs, most=20)}). Name the layers or blocks instead: targets=['...']."
        )
    return found


def _is_of(module: nn.Module, family: Family) -> bool:
    return any(_has(module, p) for p in family.attention) and any(_has(module, p) for p in family.output)
