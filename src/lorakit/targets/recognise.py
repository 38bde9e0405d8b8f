"""Recognising layers: which kind of target a module is, or why it cannot be one."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.core.target import Storage, Target, stock_class
from lorakit.core.walk import base_modules, join, module_at
from lorakit.targets.bitsandbytes_weights import bitsandbytes_layer, bitsandbytes_storage
from lorakit.targets.convolution import ConvTarget
from lorakit.targets.dense import DenseStorage
from lorakit.targets.embedding import EmbeddingTarget
from lorakit.targets.linear import LinearTarget, TransposedLinearTarget
from lorakit.targets.parameter import ParameterTarget
from lorakit.targets.quantized import dense_class, quantized_storage

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def candidates(model: nn.Module) -> dict[str, Target | str]:
    """Every layer that can be adapted, by path; for a layer of a known kind that cannot, the reason instead."""
    found: dict[str, Target | str] = {}
    for path, module in base_modules(model):
        target = _layer_target(path, module)
        if target is not None and path not in found:  # an attention has already placed its out_proj
            found[path] = target
        if isinstance(module, nn.MultiheadAttention):
            for name in _ATTENTION_WEIGHTS:
                if module._parameters.get(name) is not None:
                    parameter = ParameterTarget(join(path, name), module, name, DenseStorage())
                    found[parameter.path] = parameter
            out_path = join(path, "out_proj")
            found[out_path] = _attention_output(out_path, module)
    return found


def layer_target(model: nn.Module, path: str) -> Target | str | None:
    """The target for the layer or the bare parameter at a path.

    The reason instead when it cannot be adapted; None when there is none.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent = module_at(model, parent_path)
        module = module_at(parent, name)
    except AttributeError:
        return parameter_target(model, path)
    if name == "out_proj" and isinstance(parent, nn.MultiheadAttention):
        return _attention_output(path, parent)
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return ParameterTarget(join(path, "in_proj_weight"), module, "in_proj_weight", DenseStorage())
    return _layer_target(path, module)


def parameter_target(model: nn.Module, path: str) -> ParameterTarget | None:
    """The target for the parameter at a path, or None when there is none."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
    except AttributeError:
        return None
    value = owner._parameters.get(name)
    if value is None:
        return None
    target = ParameterTarget(path, owner, name, DenseStorage())
    parent_path, _, owner_name = owner_path.rpartition(".")
    if owner_name == "out_proj" and isinstance(model.get_submodule(parent_path), nn.MultiheadAttention):
        target.reader = model.get_submodule(parent_path)
    return target


def _attention_output(path: str, attention: nn.MultiheadAttention) -> Target:
    """The output projection, whose forward is never called: the attention reads its weight."""
    target = LinearTarget(path, attention.out_proj, DenseStorage(), binding="parameter")
    target.reader = attention
    return target


def _layer_target(path: str, module: nn.Module) -> Target | str | None:
    """A target for a layer of a known kind, the reason when it cannot be one, None for any other module."""
    stock = dense_class(stock_class(module))
    if isinstance(module, nn.Linear):
        storage = _storage(module)
        if isinstance(storage, str):
            return storage
        hooked = stock.forward is nn.Linear.forward or bitsandbytes_layer(stock)
        return LinearTarget(path, module, storage, binding="forward" if hooked else "parameter")
    if isinstance(module, nn.Embedding):
        return _embedding_target(path, module, stock)
    if isinstance(module, _CONVS):
        storage = _storage(module)
        if isinstance(storage, str):
            return storage
        hooked = any(stock.forward is kind.forward for kind in _CONVS)
        return ConvTarget(path, module, storage, binding="forward" if hooked else "parameter")
    if stock.__name__ == "Conv1D" and hasattr(module, "nf"):
        storage = _storage(module)
        return storage if isinstance(storage, str) else TransposedLinearTarget(path, module, storage)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return (
            f"{type(module).__name__} is a transposed convolution, whose kernel is not a stack of output rows"
        )
    if isinstance(module, (nn.Bilinear, nn.EmbeddingBag)):
        return f"{type(module).__name__} is not one matrix applied to one input"
    return None


def _embedding_target(path: str, module: nn.Embedding, stock: type[nn.Module]) -> Target | str:
    storage = _storage(module)
    if isinstance(storage, str):
        return storage
    if module.max_norm is not None:
        return "max_norm makes every lookup rescale rows of the table in place, so the base would not stay frozen"
    if stock.forward is nn.Embedding.forward:
        return EmbeddingTarget(path, module, storage)
    gain = getattr(module, "embed_scale", None)
    if gain is not None and module.weight.device.type != "meta":
        scale = torch.as_tensor(gain).to(module.weight)
        index = torch.arange(min(8, module.num_embeddings), device=module.weight.device)
        with torch.no_grad():
            rows = module._parameters["weight"][index]  # type: ignore[index]
            scaled = bool(rows.any()) and scale.numel() == 1  # rows of zeros would say nothing
            if scaled and torch.allclose(stock.forward(module, index), rows * scale):
                return EmbeddingTarget(path, module, storage, gain=float(scale))
    return EmbeddingTarget(path, module, storage, binding="parameter")


def _storage(module: nn.Module) -> Storage | str:
    quantized = quantized_storage(module)
    if quantized is not None:
        return quantized
    foreign = bitsandbytes_storage(module)
    if foreign is not None:
        return foreign
    weight = module._parameters.get("weight")
    if weight is None:
        if "weight" in getattr(module, "parametrizations", {}):
            return "its weight is parametrized by something else; remove that parametrization first"
        return "its weight is not an ordinary parameter"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}, which no storage here can read"
    return DenseStorage()
