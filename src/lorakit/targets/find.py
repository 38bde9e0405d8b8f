"""Finding targets: which of the layers of a model the user means.

``find`` touches nothing, so a choice can be printed, counted and asserted before anything is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import nn

from lorakit.core.selection import (
    PRESETS,
    Adapts,
    Selector,
    ends_with,
    entry_matches,
    fullmatch,
    split_part,
    unmatched,
    unmatched_expression,
)
from lorakit.core.target import Target
from lorakit.core.walk import base_modules, join
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError, listing
from lorakit.targets.blocks import chosen_blocks
from lorakit.targets.layer_names import is_key_value_or_feedforward
from lorakit.targets.named_slices import Named, slices_named
from lorakit.targets.places import PLACES, check_preset, chosen_places
from lorakit.targets.quantized import quantized_storage
from lorakit.targets.recognise import candidates, parameter_target


class _Refused(NamedTuple):
    """A layer that was chosen and cannot be adapted: an error, unless it is excluded."""

    path: str
    module: nn.Module
    reason: str


Choice = TypeVar("Choice", "Target", "Target | _Refused")


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
        targets: A preset (``"all-linear"``: every linear layer of the base model, heads left out; ``"all-conv"``: every
            convolution of it; ``"all-keys-values-feedforward"``: in a known architecture, the layers that make
            attention keys and values and those out of the feed-forward block; ``"all-parameters"``; ``"all-bias"``),
            a regular expression for whole paths, a list whose entries are paths or endings of paths (of layers or of
            parameters; of slices too, as in ``"c_attn[q]"`` or ``"qkv[0:64]"``), or a callable
            ``(path, module) -> bool``.
        exclude: What to leave out, in the same form; it must match something that ``targets`` chose.
        adapts: ``"layer"`` to take layers as matrices; ``"parameter"`` to take every parameter of what is named, as
            full fine-tuning does; ``"module"`` to take linear layers and blocks, as bottleneck adapters do
            (``"all-block-outputs"``, ``"all-ffn-outputs"``, ``"all-ffn"``); ``"attention"`` and ``"model"`` to take
            attentions, or the model's input, as prefix and prompt tuning do (``"all-attention"``, ``"all-inputs"``).

    Raises:
        UnmatchedTargetError: Nothing, or one entry of a list, matched nothing.
        UnsupportedTargetError: Something that is named cannot be adapted; the message gives the reason.
    """
    chosen: dict[str, Target | _Refused] = {t.path: t for t in _select(model, targets, adapts)}
    if not chosen:
        raise UnmatchedTargetError(f"targets={targets!r} names nothing.")
    if exclude is not None:
        chosen = without_excluded(chosen, exclude)
    places = {path: place for place, path in enumerate(_places(model))}
    return [_accepted(chosen[path]) for path in sorted(chosen, key=lambda path: _place(path, places))]


def without_excluded(chosen: dict[str, Choice], exclude: Selector) -> dict[str, Choice]:
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


def _select(model: nn.Module, targets: Selector, adapts: Adapts) -> Iterator[Target | _Refused]:
    if not isinstance(targets, str) and not callable(targets):
        for entry in targets:
            if not isinstance(entry, str):
                raise UnmatchedTargetError(f"targets must be strings; got {entry!r}.")
    check_preset(targets, adapts)
    if adapts == "module":
        yield from (_checked(Named(*chosen)) for chosen in chosen_blocks(model, targets))
    elif adapts in PLACES:
        for path, place in chosen_places(model, targets, adapts):
            yield _sound(model, path, place)
    elif isinstance(targets, str) and targets in PRESETS:
        yield from _preset(model, targets, adapts)
    elif adapts == "parameter":
        yield from _select_parameters(model, targets)
    elif isinstance(targets, str):
        layers = candidates(model)
        matched = fullmatch(targets, [*layers, *_bare_parameters(model, layers)])
        if not matched:
            raise unmatched_expression(targets, [*layers, *_bare_parameters(model, layers)])
        for path in matched:
            yield _sound(model, path, layers[path]) if path in layers else _parameter(model, path)
    elif callable(targets):
        yield from _select_by_callable(model, targets)
    else:
        yield from _select_entries(model, targets)


def _select_entries(model: nn.Module, entries: Selector) -> Iterator[Target | _Refused]:
    layers = candidates(model)
    modules = dict(base_modules(model))
    for entry in entries:  # type: ignore[union-attr]
        matched = entry_matches(entry, modules)
        for path in matched:
            module = modules[path]
            if path in layers:
                yield _sound(model, path, layers[path])
            elif isinstance(module, nn.MultiheadAttention):
                yield from (_sound(model, p, t) for p, t in layers.items() if p.startswith(path + "."))
            else:
                raise _not_a_layer(path, module, layers)
        parameters = [path for path, _ in _parameters(model) if ends_with(path, entry)]
        for path in parameters:
            yield _sound(model, path, layers[path]) if path in layers else _parameter(model, path)
        if not matched and not parameters:
            known = [*layers, *_bare_parameters(model, layers)]
            slices = slices_named(model, entry, known, "layer")
            if not slices:
                raise unmatched(entry, known)
            yield from map(_checked, slices)


def _select_parameters(model: nn.Module, targets: Selector) -> Iterator[Target | _Refused]:
    """Every parameter of what is named: a module stands for all that is in it."""
    parameters = _weights(model)
    modules = [path for path, _ in base_modules(model)]
    if callable(targets):
        owners = dict(base_modules(model))
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
        slices = [] if found or isinstance(targets, str) else slices_named(model, entry, (), "parameter")
        if slices:
            yield from map(_checked, slices)
            continue
        if not found:
            raise (
                unmatched_expression(entry, parameters + modules)
                if isinstance(targets, str)
                else unmatched(entry, parameters + modules)
            )
        yield from (_parameter(model, path) for path in found)


def _select_by_callable(
    model: nn.Module, choose: Callable[[str, nn.Module], bool]
) -> Iterator[Target | _Refused]:
    layers = candidates(model)
    chosen = 0
    for path, target in layers.items():
        module = target.module if isinstance(target, Target) else model.get_submodule(path)
        if choose(path, module):
            chosen += 1
            yield _sound(model, path, target)
    if not chosen:
        raise UnmatchedTargetError(
            f"The callable {choose!r} chose none of the {len(layers)} layers that can be adapted."
        )


def _preset(model: nn.Module, preset: str, adapts: Adapts) -> Iterator[Target | _Refused]:
    if preset in ("all-linear", "all-conv", "all-keys-values-feedforward"):
        if adapts == "parameter":
            raise UnmatchedTargetError(
                f"{preset!r} chooses layers; for whole parameters use 'all-parameters' or names."
            )
        chosen, what = {
            "all-linear": (_is_linear, "linear layer"),
            "all-conv": (_is_convolution, "convolution"),
            "all-keys-values-feedforward": (is_key_value_or_feedforward, "such layer"),
        }[preset]
        found = 0
        for path, target in candidates(model).items():
            if chosen(target, model, path) and not _in_head(model, path):
                found += 1
                yield _sound(model, path, target)
        if not found:
            raise UnmatchedTargetError(
                f"{preset!r} found no {what} in {type(model).__name__}; name the targets instead "
                f"(it has: {listing(_endings(candidates(model))) or 'no layer that can be adapted'})."
            )
        return
    paths = _weights(model)
    if preset == "all-bias":
        paths = [path for path in paths if path.endswith("bias")]
    if not paths:
        raise UnmatchedTargetError(f"{preset!r} found no such parameter in {type(model).__name__}.")
    yield from (_parameter(model, path) for path in paths)


def _is_linear(target: Target | str, model: nn.Module, path: str) -> bool:
    if isinstance(target, str):
        return isinstance(model.get_submodule(path), nn.Linear)
    return target.shape.kind == "linear" or isinstance(target.module, nn.MultiheadAttention)


def _is_convolution(target: Target | str, model: nn.Module, path: str) -> bool:
    """A convolution forwards: a transposed one has no kernel of output rows, and is no choice of a preset."""
    if isinstance(target, str):
        return isinstance(model.get_submodule(path), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return target.shape.kind == "conv"


def _in_head(model: nn.Module, path: str) -> bool:
    """Whether a layer lies outside the base model: an output or classification head."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return not path.startswith(prefix + ".")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head is not None and model.get_submodule(path) is head


def _excluded(exclude: Selector, chosen: Mapping[str, Target | _Refused]) -> set[str]:
    if callable(exclude):
        matched = {path for path, t in chosen.items() if exclude(path, t.module)}
        if not matched:
            raise UnmatchedTargetError(
                f"The callable {exclude!r} excludes none of the {len(chosen)} targets that were chosen."
            )
        return matched
    if isinstance(exclude, str):
        matched = set(fullmatch(exclude, chosen))
        if not matched:
            raise unmatched_expression(exclude, list(chosen))
        return matched
    dropped: set[str] = set()
    for entry in exclude:
        matched = {p for p in chosen if ends_with(p, entry) or f".{entry}." in f".{split_part(p)[0]}."}
        if not matched:
            raise unmatched(entry, list(chosen), what="exclude entry")
        dropped |= matched
    return dropped


def _sound(model: nn.Module, path: str, target: Target | str) -> Target | _Refused:
    return _Refused(path, model.get_submodule(path), target) if isinstance(target, str) else target


def _checked(named: Named) -> Target | _Refused:
    return _Refused(*named) if isinstance(named.target, str) else named.target  # type: ignore[arg-type]


def _accepted(target: Target | _Refused) -> Target:
    if isinstance(target, _Refused):
        raise UnsupportedTargetError(f"{target.path!r} cannot be adapted: {target.reason}.")
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


def _parameter(model: nn.Module, path: str) -> Target | _Refused:
    target = parameter_target(model, path)
    if target is not None and target.stored.is_floating_point():
        return target
    owner = model.get_submodule(path.rpartition(".")[0])
    return _Refused(
        path, owner, "it is quantised, so there is no whole weight to train (see lorakit.dequantize)"
    )


def _bare_parameters(model: nn.Module, layers: dict[str, Target | str]) -> list[str]:
    """Matrices that belong to no layer of a known kind."""
    return [
        path
        for path, p in _parameters(model)
        if p.dim() >= 2 and path.rpartition(".")[0] not in layers and path not in layers
    ]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(path, name), parameter


def _weights(model: nn.Module) -> list[str]:
    """The paths of all parameters, and of the weights that are kept in another form."""
    hidden = [join(path, "weight") for path, m in base_modules(model) if quantized_storage(m) is not None]
    return [*(path for path, _ in _parameters(model)), *hidden]


def _places(model: nn.Module) -> Iterator[str]:
    """The paths of all modules and parameters, in the order of the model's modules."""
    for path, module in base_modules(model):
        yield path
        if quantized_storage(module) is not None:
            yield join(path, "weight")
        yield from (join(path, name) for name in module._parameters)


def _place(path: str, places: Mapping[str, int]) -> int:
    """Where a target comes in the order of the model's modules; slices of one layer in the order of the choice."""
    return places[path if path in places else split_part(path)[0]]


def _endings(paths: Iterable[str]) -> list[str]:
    """The last parts of paths, each once."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})
