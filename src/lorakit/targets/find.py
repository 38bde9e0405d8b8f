"""Finding targets: which of the layers of a model the user means.

``find`` touches nothing, so a choice can be printed, counted and asserted before anything is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

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
from lorakit.core.target import Target
from lorakit.core.walk import base_modules, join
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError, listing
from lorakit.targets.recognise import candidates, parameter_target

Adapts = Literal["layer", "parameter"]


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
    chosen: dict[str, Target | _Refused] = {t.path: t for t in _select(model, targets, adapts)}
    if not chosen:
        raise UnmatchedTargetError(f"targets={targets!r} names nothing.")
    if exclude is not None:
        chosen = without_excluded(chosen, exclude)
    places = {path: place for place, path in enumerate(_places(model))}
    return [_accepted(chosen[path]) for path in sorted(chosen, key=places.__getitem__)]


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
            raise unmatched(entry, [*layers, *_bare_parameters(model, layers)])


def _select_parameters(model: nn.Module, targets: Selector) -> Iterator[Target | _Refused]:
    """Every parameter of what is named: a module stands for all that is in it."""
    parameters = [path for path, _ in _parameters(model)]
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
    if preset == "all-linear":
        if adapts == "parameter":
            raise UnmatchedTargetError(
                "'all-linear' chooses layers; for whole parameters use 'all-parameters' or names."
            )
        found = 0
        for path, target in candidates(model).items():
            if _is_linear(target, model, path) and not _in_head(model, path):
                found += 1
                yield _sound(model, path, target)
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
        matched = set(entry_matches(entry, chosen)) | {p for p in chosen if f".{entry}." in f".{p}."}
        if not matched:
            raise unmatched(entry, list(chosen), what="exclude entry")
        dropped |= matched
    return dropped


def _sound(model: nn.Module, path: str, target: Target | str) -> Target | _Refused:
    return _Refused(path, model.get_submodule(path), target) if isinstance(target, str) else target


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


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(path, name), parameter


def _places(model: nn.Module) -> Iterator[str]:
    """The paths of all modules and parameters, in the order of the model's modules."""
    for path, module in base_modules(model):
        yield path
        yield from (join(path, name) for name in module._parameters)


def _endings(paths: Iterable[str]) -> list[str]:
    """The last parts of paths, each once."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})
