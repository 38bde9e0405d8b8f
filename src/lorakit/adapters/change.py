"""What an adapter adds to the weight of one target: as factors, or dense where a method has none.

Everything in `lorakit.adapters` that computes with changes reads them here, in float64 and with the scale that acts, so
that LoRA, rsLoRA, VeRA, AdaLoRA and subtracted starts can be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.core import AdapterSpec, AdapterState, DeltaMethod, LowRankMethod, Shape, Target, WeightMethod
from lorakit.core.method import Method
from lorakit.errors import ConfigError, listing
from lorakit.methods import DoRA, LoRA
from lorakit.methods.decomposed import Decomposed
from lorakit.ops import all_finite

Base = Mapping[str, Tensor]
"""Target path to its base weight as the stack ``(*batch, out, in)``."""


class Change(NamedTuple):
    """A change ``scale * B A`` of a weight.

    Attributes:
        A: ``(*batch, r, in)``.
        B: ``(*batch, out, r)``.
        scale: A number that is not yet in the factors.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def folded(self) -> tuple[Tensor, Tensor]:
        """``A``, and ``B`` with the scale in it."""
        return self.A, self.B * self.scale


class ShapeTarget(Target):
    """A target of which only the facts are known: enough for a method to tell its change."""

    def __init__(self, path: str, shape: Shape) -> None:
        self.path, self.shape = path, shape

    @property
    def bias(self) -> Tensor | None:
        """None: there is no layer."""
        return None

    def to_matrix(self, stored: Tensor) -> Tensor:
        """There is nothing stored."""
        raise NotImplementedError

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """There is nothing stored."""
        raise NotImplementedError

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """There is no layer."""
        raise NotImplementedError

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """There is no layer."""
        raise NotImplementedError


def low_rank_change(state: AdapterState, path: str) -> Change:
    """The change at one target as factors, in float64.

    Raises:
        ConfigError: The method there has no factors; the message says what can be done.
    """
    method = state.spec.methods[path]
    if not isinstance(method, LowRankMethod):
        raise ConfigError(_no_factors(path, method))
    p = _wide(state, path)
    return Change(*method.factors(state.spec.shapes[path], p))


def dense_change(state: AdapterState, path: str, base: Base | None = None) -> Tensor:
    """The change at one target as the stack ``(*batch, out, in)``, in float64.

    Args:
        state: The adapter.
        path: One of its targets.
        base: Base weights, for methods whose change depends on them (DoRA, IA3, trained copies).

    Raises:
        ConfigError: The method changes no weight, or its change depends on a base that is not given.
    """
    method, shape = state.spec.methods[path], state.spec.shapes[path]
    p, target = _wide(state, path), ShapeTarget(path, shape)
    if isinstance(method, DeltaMethod):
        return method.delta(target, p)
    if not isinstance(method, WeightMethod):
        raise ConfigError(
            f"{path!r} is adapted by {method.name}, which changes no weight: there is nothing to add or "
            "compare. Leave this adapter out, or its targets."
        )
    if base is None or path not in base:
        raise ConfigError(
            f"What {method.name} changes at {path!r} depends on the base weight. Give it: `--base FOLDER`, or "
            f"base={{{path!r}: W}}, with W as {shape}."
        )
    W = base_weight(path, shape, base[path])
    return method.weight(target, p, W) - W


def base_weight(path: str, shape: Shape, W: Tensor) -> Tensor:
    """A base weight in float64.

    Args:
        path: The target, for the message.
        shape: Its facts.
        W: Any floating dtype.

    Raises:
        ConfigError: It is not the stack ``(*batch, out, in)`` that the target has.
    """
    want = (*shape.batch, shape.out, shape.in_)
    if tuple(W.shape) != want:
        raise ConfigError(
            f"The base weight of {path!r} should have the size {want}; it has {tuple(W.shape)}."
        )
    return W.detach().double()


def direction_of(method: Method) -> Method:
    """What is inside a DoRA, and changes the direction of the weight; any other method itself."""
    return method.inner if isinstance(method, Decomposed) else method


def without_magnitude(state: AdapterState, path: str) -> AdapterState:
    """The adapter of one target, with what is inside a DoRA in its place."""
    own = dict(state.tensors[path])
    method = direction_of(state.spec.methods[path])
    if method is not state.spec.methods[path]:
        own.pop("magnitude")
    shared = {name: state.shared[name] for name in method.shared_shapes()}
    return AdapterState(AdapterSpec({path: method}, {path: state.spec.shapes[path]}), {path: own}, shared)


def bias_change(state: AdapterState, path: str) -> Tensor | None:
    """What is added to the bias of a target, in float64, or None."""
    return _bias(state.spec.methods[path], _wide(state, path))


def is_low_rank(state: AdapterState, path: str) -> bool:
    """Whether the change at a target has factors."""
    return isinstance(state.spec.methods[path], LowRankMethod)


def has_factors(state: AdapterState, path: str) -> bool:
    """Whether the change at a target is low-rank, or inside a DoRA that of the direction is."""
    return isinstance(direction_of(state.spec.methods[path]), LowRankMethod)


def numel_of_direction(shape: Shape) -> int:
    """Numbers in the factors for each rank: ``out + in``, for every matrix of a stack."""
    return shape.numel // (shape.out * shape.in_) * (shape.out + shape.in_)


def is_copy(method: Method) -> bool:
    """Whether a method replaces parameters by trained copies (full fine-tuning, BitFit, token rows)."""
    return set(method.roles.values()) == {"copy"}


def require_finite(state: AdapterState, who: str) -> None:
    """Raise `ConfigError` if a tensor of an adapter holds a NaN or an infinity, naming it."""
    if any(not all_finite(tensor) for _, _, tensor in state.all_tensors()):
        raise ConfigError(
            f"{who} holds a NaN or an infinity in {listing(state.non_finite())}: its training went wrong there, and "
            "so would whatever is computed from it."
        )


def widest_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype that holds all of them."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def as_lora(
    A: Tensor, B: Tensor, bias: Tensor | None, *, scale: float, dtype: torch.dtype
) -> tuple[LoRA, dict[str, Tensor]]:
    """``scale * B A`` as a LoRA and its tensors: ``alpha = r * scale``, whatever scaling the sources had."""
    r = A.shape[-2]
    tensors = {"lora_A": A.to(dtype).contiguous(), "lora_B": B.to(dtype).contiguous()}
    if bias is not None:
        tensors["lora_bias"] = (bias / scale).to(dtype)
    return LoRA(r=r, alpha=r * scale, bias=bias is not None), tensors


def _wide(state: AdapterState, path: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: t.detach().double() for name, t in state.parameters(path).items()}


def _bias(method: Method, p: Mapping[str, Tensor]) -> Tensor | None:
    return p["lora_bias"] * method.scale if isinstance(method, LoRA) and method.bias else None


def _no_factors(path: str, method: Method) -> str:
    if isinstance(method, DoRA):
        return (
            f"{path!r} is adapted by DoRA: what it adds depends on the base weight, and magnitudes cannot be added up. "
            "Give the base weights (base=..., `--base`) and the true change is taken, or merge each adapter into the "
            "base."
        )
    if isinstance(method, DeltaMethod):
        return (
            f"{path!r} is adapted by {method.name}, whose change is not a product of two factors. It can be formed and "
            "approximated at a rank: pass dense=True and r (`--dense --rank R`)."
        )
    if is_copy(method):
        return (
            f"{path!r} is not changed by an addition but replaced by a trained copy ({method.name}). Say what should "
            "become of copies: copies='average' or copies='drop'."
        )
    return (
        f"{path!r} is adapted by {method.name}, which is no addition to a weight: this is not defined for it."
    )


def parameter_shape(size: tuple[int, ...]) -> Shape:
    """The facts of a whole parameter of that size, as `lorakit.attach` sees it."""
    if len(size) >= 2:
        return Shape("parameter", out=size[-2], in_=size[-1], batch=size[:-2], stored=size)
    return Shape("parameter", out=size[0] if size else 1, in_=1, stored=size)
