"""Finding targets: which layers of a model can be adapted, and which of them the user means.

``find`` touches nothing, so a choice can be printed, counted and asserted before anything is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from lorakit.core.selection import (
    PRESETS,
    Selector,
    ends_with,
    entry_matches,
    fullmatch,
    unmatched,
    unmatched_expression,
)
from lorakit.core.target import Storage, Target, stock_class
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError, listing
from lorakit.targets.convolution import ConvTarget
from lorakit.targets.dense import DenseStorage
from lorakit.targets.embedding import EmbeddingTarget
from lorakit.targets.linear import LinearTarget, TransposedLinearTarget
from lorakit.targets.parameter import ParameterTarget

Adapts = Literal["layer", "parameter"]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_HOME = "lorakit"  # the child module that attach adds to a layer: never part of a choice


def find(
    model: nn.Module,
    targets: Selector = "all-linear",
    *,
    exclude: Selector | None = None,
    adapts: Adapts = "layer",
) -> list[Target]:
    """The targets that a choice means, in the order of the model's modules.

    Args:
        model: Any module.
        targets: A preset (``"all-linear"``: every linear layer of the base model, heads left out; ``"all-parameters"``;
            ``"all-bias"``), a regular expression for whole paths, a list whose entries are paths or endings of paths
            (of layers or of parameters), or a callable ``(path, module) -> bool``.
        exclude: What to leave out, in the same form; it must match something that ``targets`` chose.
        adapts: ``"layer"`` to take layers as matrices; ``"parameter"`` to take every parameter of what is named, as
            full fine-tuning does.

    Raises:
        UnmatchedTargetError: Nothing, or one entry of a list, matched nothing.
        UnsupportedTargetError: Something that is named cannot be adapted; the message gives the reason.
    """
    chosen = {t.path: t for t in _select(model, targets, adapts)}
    if exclude is None:
        return list(chosen.values())
    return list(without_excluded(chosen, exclude).values())


def without_excluded(chosen: dict[str, Target], exclude: Selector) -> dict[str, Target]:
    """What ``exclude`` leaves of a choice.

    Raises:
        UnmatchedTargetError: It, or one entry of it, matches nothing in the choice; or it leaves nothing.
    """
    dropped = _excluded(exclude, chosen)
    left = {path: t for path, t in chosen.items() if path not in dropped}
    if not left:
        raise UnmatchedTargetError(
            f"exclude={exclude!r} leaves none of the {len(chosen)} targets that were chosen."
        )
    return left


def candidates(model: nn.Module) -> dict[str, Target | str]:
    """Every layer that can be adapted, by path; for a layer of a known kind that cannot, the reason instead."""
    found: dict[str, Target | str] = {}
    for path, module in _modules(model):
        target = _layer_target(path, module)
        if target is not None and path not in found:  # an attention has already placed its out_proj
            found[path] = target
        if isinstance(module, nn.MultiheadAttention):
            for name in _ATTENTION_WEIGHTS:
                if module._parameters.get(name) is not None:
                    parameter = ParameterTarget(_join(path, name), module, name, DenseStorage())
                    found[parameter.path] = parameter
            out_path = _join(path, "out_proj")
            # Its forward is never called: the attention reads its weight.
            found[out_path] = LinearTarget(out_path, module.out_proj, DenseStorage(), binding="parameter")
    return found


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
    return ParameterTarget(path, owner, name, DenseStorage())


def layer_target(model: nn.Module, path: str) -> Target | str | None:
    """The target for the layer or the bare parameter at a path.

    The reason instead when it cannot be adapted; None when there is none.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return parameter_target(model, path)
    parent_path, _, name = path.rpartition(".")
    if name == "out_proj" and isinstance(model.get_submodule(parent_path), nn.MultiheadAttention):
        return LinearTarget(path, module, DenseStorage(), binding="parameter")
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return ParameterTarget(_join(path, "in_proj_weight"), module, "in_proj_weight", DenseStorage())
    return _layer_target(path, module)


# ---- recognising ----------------------------------------------------------------------------------------------------
def _layer_target(path: str, module: nn.Module) -> Target | str | None:
    """A target for a layer of a known kind, the reason when it cannot be one, None for any other module."""
    stock = stock_class(module)
    if isinstance(module, nn.Linear):
        storage = _storage(module)
        if isinstance(storage, str):
            return storage
        hooked = stock.forward is nn.Linear.forward
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
        value = float(torch.as_tensor(gain).to(module.weight.dtype))
        index = torch.zeros(1, dtype=torch.long, device=module.weight.device)
        with torch.no_grad():
            if torch.allclose(stock.forward(module, index), module.weight[index] * value):
                return EmbeddingTarget(path, module, storage, gain=value)
    return EmbeddingTarget(path, module, storage, binding="parameter")


def _storage(module: nn.Module) -> Storage | str:
    weight = module._parameters.get("weight")
    if weight is None:
        if "weight" in getattr(module, "parametrizations", {}):
            return "its weight is parametrized by something else; remove that parametrization first"
        return "its weight is not an ordinary parameter"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}, which no storage here can read"
    return DenseStorage()


# ---- selecting ------------------------------------------------------------------------------------------------------
def _select(model: nn.Module, targets: Selector, adapts: Adapts) -> Iterator[Target]:
    if isinstance(targets, str) and targets in PRESETS:
        yield from _preset(model, targets, adapts)
    elif adapts == "parameter":
        yield from _select_parameters(model, targets)
    elif isinstance(targets, str):
        layers = candidates(model)
        matched = fullmatch(targets, [*layers, *_bare_parameters(model, layers)])
        if not matched:
            raise unmatched_expression(targets, [*layers, *_bare_parameters(model, layers)])
        for path in matched:
            yield _sound(path, layers[path]) if path in layers else _parameter(model, path)
    elif callable(targets):
        yield from _select_by_callable(model, targets)
    else:
        yield from _select_entries(model, targets)


def _select_entries(model: nn.Module, entries: Selector) -> Iterator[Target]:
    layers = candidates(model)
    modules = dict(_modules(model))
    for entry in entries:  # type: ignore[union-attr]
        if not isinstance(entry, str):
            raise UnmatchedTargetError(f"targets must be strings; got {entry!r}.")
        matched = entry_matches(entry, modules)
        for path in matched:
            module = modules[path]
            if path in layers:
                yield _sound(path, layers[path])
            elif isinstance(module, nn.MultiheadAttention):
                yield from (_sound(p, t) for p, t in layers.items() if p.startswith(path + "."))
            else:
                raise _not_a_layer(path, module, layers)
        parameters = [path for path, _ in _parameters(model) if ends_with(path, entry)]
        for path in parameters:
            yield _sound(path, layers[path]) if path in layers else _parameter(model, path)
        if not matched and not parameters:
            raise unmatched(entry, [*layers, *_bare_parameters(model, layers)])


def _select_parameters(model: nn.Module, targets: Selector) -> Iterator[Target]:
    """Every parameter of what is named: a module stands for all that is in it."""
    parameters = [path for path, _ in _parameters(model)]
    modules = [path for path, _ in _modules(model)]
    if callable(targets):
        owners = dict(_modules(model))
        matched = [p for p in parameters if targets(p, owners[p.rpartition(".")[0]])]
        if not matched:
            raise UnmatchedTargetError(
                f"The callable {targets!r} chose none of the {len(parameters)} parameters."
            )
        yield from (_parameter(model, path) for path in matched)
        return
    for entry in [targets] if isinstance(targets, str) else targets:
        named = (
            fullmatch(entry, parameters + modules)
            if isinstance(targets, str)
            else entry_matches(entry, parameters + modules)
        )
        found = [p for p in parameters if any(p == n or p.startswith(n + ".") for n in named)]
        if not found:
            raise (
                unmatched_expression(entry, parameters)
                if isinstance(targets, str)
                else unmatched(entry, parameters + modules)
            )
        yield from (_parameter(model, path) for path in found)


def _select_by_callable(model: nn.Module, choose: Callable[[str, nn.Module], bool]) -> Iterator[Target]:
    layers = candidates(model)
    chosen = 0
    for path, target in layers.items():
        module = target.module if isinstance(target, Target) else model.get_submodule(path)
        if choose(path, module):
            chosen += 1
            yield _sound(path, target)
    if not chosen:
        raise UnmatchedTargetError(
            f"The callable {choose!r} chose none of the {len(layers)} layers that can be adapted."
        )


def _preset(model: nn.Module, preset: str, adapts: Adapts) -> Iterator[Target]:
    if preset == "all-linear":
        if adapts == "parameter":
            raise UnmatchedTargetError(
                "'all-linear' chooses layers; for whole parameters use 'all-parameters' or names."
            )
        found = 0
        for path, target in candidates(model).items():
            if _is_linear(target, model, path) and not _in_head(model, path):
                found += 1
                yield _sound(path, target)
        if not found:
            raise UnmatchedTargetError(
                f"'all-linear' found no linear layer in {type(model).__name__}; name the targets instead "
                f"(it has: {listing(_endings(candidates(model))) or 'no layer that can be adapted'})."
            )
        return
    paths = [path for path, _ in _parameters(model)]
    if preset == "all-bias":
        paths = [path for path in paths if path.endswith("bias")]
    if not paths:
        raise UnmatchedTargetError(f"{preset!r} found no such parameter in {type(model).__name__}.")
    yield from (_parameter(model, path) for path in paths)


def _is_linear(target: Target | str, model: nn.Module, path: str) -> bool:
    if isinstance(target, str):
        return isinstance(model.get_submodule(path), nn.Linear)
    return target.shape.kind == "linear" or isinstance(target.module, nn.MultiheadAttention)


def _in_head(model: nn.Module, path: str) -> bool:
    """Whether a layer lies outside the base model: an output or classification head."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return not path.startswith(prefix + ".")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head is not None and model.get_submodule(path) is head


def _excluded(exclude: Selector, chosen: dict[str, Target]) -> set[str]:
    if callable(exclude):
        return {path for path, t in chosen.items() if exclude(path, t.module)}
    if isinstance(exclude, str):
        matched = set(fullmatch(exclude, chosen))
        if not matched:
            raise unmatched_expression(exclude, list(chosen))
        return matched
    dropped: set[str] = set()
    for entry in exclude:
        matched = set(entry_matches(entry, chosen)) | {p for p in chosen if f".{entry}." in f".{p}."}
        if not matched:
            raise unmatched(entry, list(chosen), what="exclude entry")
        dropped |= matched
    return dropped


def _sound(path: str, target: Target | str) -> Target:
    if isinstance(target, str):
        raise UnsupportedTargetError(f"{path!r} cannot be adapted: {target}.")
    return target


def _not_a_layer(path: str, module: nn.Module, layers: dict[str, Target | str]) -> UnsupportedTargetError:
    inside = [p for p in layers if p.startswith(path + ".")]
    if inside:
        ends = sorted({p.rsplit(".", 1)[-1] for p in inside})
        return UnsupportedTargetError(
            f"{path!r} is a {type(module).__name__}, not a layer; inside it are: {listing(ends)}. Name those."
        )
    own = [name for name, _ in module.named_parameters()]
    hint = f" To train it in full, attach FullFineTuning to it ({listing(own)})." if own else ""
    return UnsupportedTargetError(
        f"{path!r} is a {type(module).__name__}, which holds no matrix that can be adapted.{hint}"
    )


def _parameter(model: nn.Module, path: str) -> Target:
    target = parameter_target(model, path)
    assert target is not None
    return target


def _bare_parameters(model: nn.Module, layers: dict[str, Target | str]) -> list[str]:
    """Matrices that belong to no layer of a known kind."""
    return [
        path
        for path, p in _parameters(model)
        if p.dim() >= 2 and path.rpartition(".")[0] not in layers and path not in layers
    ]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if _HOME not in path.split("."):
            yield path, module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in _modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _join(path, name), parameter


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _endings(paths: Iterable[str]) -> list[str]:
    """The last parts of paths, each once."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})
