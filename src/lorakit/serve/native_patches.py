"""An adapter as patches of the compiled step: factors, gains and shifts for each weight.

Factors of plain LoRA are used where the adapter's state has them, so being ready to run takes no memory and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.core.method import LowRankMethod, Method, Tensors
from lorakit.core.target import Shape
from lorakit.errors import AdapterIncompatibleError
from lorakit.methods.dora import DoRA
from lorakit.ops.native.decoder import Change, Patches
from lorakit.serve.native_model import NativeModel

_OTHER_WAY = "start the server with --runner transformers, which runs every method"


@dataclass
class Prepared:
    """What an adapter changes.

    Attributes:
        state: The adapter, whose tensors the patches read.
        patches: At the weights.
        lookup: At the embedding; None when it leaves that alone.
        nbytes: Of what is kept beside the adapter's own tensors.
    """

    state: AdapterState
    patches: Patches
    lookup: Change | None
    nbytes: int


def prepare_patches(name: str, state: AdapterState, model: NativeModel, embedding: Tensor) -> Prepared:
    """Turn an adapter into patches.

    Args:
        name: What it is called, for errors.
        state: The adapter.
        model: The base.
        embedding: The weight of its embedding, ``(vocabulary, hidden)``.

    Raises:
        AdapterIncompatibleError: It changes something that patches cannot say.
    """
    given, state = state, state.plain()
    weights = (*(weight for layer in model.layers for weight in layer.weights), model.head)
    changes: list[list[Change | None]] = [[None] * len(weight.sizes) for weight in weights]
    lookup: Change | None = None
    for path, method in state.spec.methods.items():
        p, shape = state.parameters(path), state.spec.shapes[path]
        if path == model.lookup:
            lookup = _change(name, path, method, shape, p, embedding.t)
            continue
        place = model.places.get(path)
        if place is None:
            raise AdapterIncompatibleError(
                f"{name!r} adapts {path!r}, which the compiled engine does not change; {_OTHER_WAY}."
            )
        weight = weights[place.weight]
        want = (weight.sizes[place.part], weight.in_)
        if (shape.out, shape.in_) != want:
            raise AdapterIncompatibleError(
                f"{name!r} is for a layer {path!r} of size {shape.out} x {shape.in_}; this base has {want[0]} x "
                f"{want[1]}."
            )
        changes[place.weight][place.part] = _change(
            name, path, method, shape, p, partial(weight.part, place.part)
        )
    patches = Patches(changes, weights)
    # What lies in the state's own memory is kept by the state, and needs no second object that says so.
    patches.tensors = _beside(given, patches.tensors)
    more = () if lookup is None else (lookup.A, lookup.B, lookup.gain)
    beside = [*patches.tensors, *_beside(given, more)]
    return Prepared(given, patches, lookup, sum(tensor.nbytes for tensor in beside))


def _beside(state: AdapterState, kept: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that are not in the state's own memory."""
    own = {tensor.untyped_storage().data_ptr() for _, _, tensor in state.all_tensors()}
    return [t for t in kept if t is not None and t.untyped_storage().data_ptr() not in own]


def add_to_lookup(x: Tensor, tokens: Tensor, change: Change) -> None:
    """Change embedded ``tokens`` ``(rows, hidden)`` in place."""
    if change.A is not None and change.B is not None:
        x.addmm_(change.A[:, tokens].T.float(), change.B.T.float(), alpha=change.scale)
    if change.gain is not None:
        x.mul_(change.gain)


def _change(
    name: str, path: str, method: Method, shape: Shape, p: Tensors, base: Callable[[], Tensor]
) -> Change:
    inner = method.inner if isinstance(method, DoRA) else method
    if not isinstance(inner, LowRankMethod) or shape.batch:
        raise AdapterIncompatibleError(
            f"{name!r} has {method.name} at {path!r}, which is no low-rank change of a plain layer; {_OTHER_WAY}."
        )
    A, B, scale = inner.factors(shape, p)
    # Of the target a low-rank method needs no more than its shape.
    if isinstance(method, DoRA):
        norms = method.norms(shape, p, base())  # type: ignore[arg-type]
        return Change(A, B, scale, gain=p["magnitude"].float() / norms)
    return Change(A, B, scale, shift=inner.bias_delta(shape, p))  # type: ignore[arg-type]
