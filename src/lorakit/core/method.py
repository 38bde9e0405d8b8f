"""What a method is: a formula for the new weight. Each tier derives more from less.

| tier | says | derived |
|---|---|---|
| `Method` | `shapes`, `start`, `forward` | routing, saving, counting |
| `WeightMethod` | `weight`: the new weight | forward, merge, export |
| `DeltaMethod` | `delta`: what is added | weight, forward |
| `LowRankMethod` | `factors`: `A`, `B`, scale | delta, the fused forward, serving, rank tools |
| `KeyValueMethod` | `keys_values`: what attention sees besides | acts inside the attention |
| `InputMethod` | `vectors`: what the model reads first | acts on the model's input |

A method is a frozen dataclass: the configuration *is* the method. It never sees a layer class.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakit.core.process import Site, TrainingProcess
from lorakit.core.selection import Adapts
from lorakit.core.target import Shape, Target

Tensors = Mapping[str, Tensor]


class Factors(NamedTuple):
    """A low-rank change ``scale * B A``: ``A`` ``(*batch, r, in)``, ``B`` ``(*batch, out, r)``."""

    A: Tensor
    B: Tensor
    scale: float


class Method(ABC):
    """One way to adapt a target.

    Attributes:
        name: The registered name, used in files; of a method that is not registered, its class's name.
        roles: Parameter name to role: ``"A"`` and ``"B"`` are the factors that LoRA+ gives their own learning
            rates; ``"magnitude"``, ``"copy"`` and ``"bias"`` say what they are.
        frozen: Names of parameters that are never trained.
        default_targets: What is adapted when the user names no targets.
        adapts: Whether a name means a layer, every parameter of what is named, a block, an attention, or a whole model.
        starts_at_base: Whether a fresh adapter leaves the output as it was.
        packable: Whether it acts on documents that are packed into one row as on each of them alone.
        follows_ties: Whether the change acts wherever the weight is tied to, and not only at the target named.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, str]] = {}
    default_targets: ClassVar[str] = "all-linear"
    adapts: ClassVar[Adapts] = "layer"
    starts_at_base: ClassVar[bool] = True
    packable: ClassVar[bool] = True
    follows_ties: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Name a method that nobody registers, so that it can be tried out."""
        super().__init_subclass__()
        cls.name = cls.__name__

    @property
    def frozen(self) -> frozenset[str]:
        """Names of parameters that are never trained."""
        return frozenset()

    @abstractmethod
    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Name to size of a target's own parameters, from the facts of the target alone: what a planner counts."""

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to size of the parameters that all targets of an adapter share: stored, moved and counted once."""
        return {}

    @abstractmethod
    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Fresh parameters of a target's own, beside those ``shared``: on the CPU or its device, at least float32."""

    def start_shared(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Fresh shared parameters, see ``shared_shapes``."""
        return {}

    @abstractmethod
    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """The adapted output.

        Args:
            target: The layer.
            p: This adapter's parameters at this target, the shared ones included.
            x: The layer's input.
            y: The layer's base output, owned by the callee: it may be changed in place and returned.
            training: Whether dropout is active.
        """

    def supports(self, target: Target) -> str | None:
        """Why this method cannot adapt this target, or None when it can."""
        return None

    def check_start(self, target: Target) -> None:  # noqa: B027 - most methods can begin anywhere
        """Refuse a setting with which a fresh adapter cannot begin at a target, before anything is made of it.

        Raises:
            ConfigError: A setting makes no sense there, such as a rank that no matrix of this size can have.
        """

    def for_path(self, path: str) -> Method:
        """This method with its per-pattern settings resolved for one target."""
        return self

    def for_targets(self, shapes: Mapping[str, Shape]) -> Method:
        """This method with the settings resolved that depend on all of its targets (path to facts) together."""
        return self

    def patterns(self) -> tuple[str, ...]:
        """The per-pattern keys, so that one which matches nothing can be refused."""
        return ()

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess | None:
        """What runs along with the training of the targets that this method adapts; None for most methods."""
        return None

    def compact(self, shape: Shape, tensors: Tensors) -> tuple[Method, Tensors]:
        """The same change with what has no effect left out, for saving: a method and its tensors at one target."""
        return self, tensors

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[Method, Tensors]:
        """The same change as programs other than lorakit can say it: without what only further training needs.

        Args:
            shape: The facts of the target.
            tensors: All that act there, the shared ones included.
        """
        return self, tensors

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `method_from_json` turns back into an equal method."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"method": self.name, **{k: _plain(v) for k, v in fields.items()}}


class WeightMethod(Method):
    """A method that defines the new weight: it can be merged."""

    @abstractmethod
    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """The new weight ``(*batch, out, in)`` from the base ``W`` of the same size."""

    def bias_delta(self, target: Target, p: Tensors) -> Tensor | None:
        """What is added to the layer's bias ``(out,)``, or None."""
        return None

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """The parameters that run along the output rows: name to dimension, counted from the end.

        With these cut to some rows, `weight` gives those rows of the new weight from the same rows of the base: a large
        weight can then be merged block by block. None when it takes more than that, see `at_rows`.
        """
        return None

    def at_rows(
        self, shape: Shape, tensors: Tensors, start: int, stop: int
    ) -> tuple[WeightMethod, Tensors] | None:
        """The same change at the output rows from ``start`` to ``stop`` alone: a method and its tensors there.

        Args:
            shape: The facts of the whole target.
            tensors: All that act there, the shared ones included.
            start: The first row.
            stop: The row after the last.

        Returns:
            By default what `along_rows` says; None when the rows cannot be told apart.
        """
        along = self.along_rows(shape)
        if along is None:
            return None
        cut = {name: tensors[name].narrow(dim, start, stop - start) for name, dim in along.items()}
        return self, {**tensors, **cut}

    def sums_over_rows(self, target: Target, p: Tensors, W: Tensor) -> Tensors:
        """What `weight` has to know of all rows, as sums over those that are given; for most methods nothing.

        Of a weight that is merged block by block, the sums of all blocks are added up and stand among the parameters of
        each.
        """
        return {}

    def fold(self, target: Target, p: Tensors, W: Tensor, base: Tensor, weight: float) -> Tensor:
        """``W + weight * (weight(base) - base)``: one step of a merge that started at ``W = base``."""
        new = self.weight(target, p, base)
        return new if W is base and weight == 1 else torch.add(W, new - base, alpha=weight)

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """Derived: apply the new weight. A faster override must equal this."""
        return target.add_bias(target.apply(x, self.weight(target, p, target.weight()).to(y.dtype)))


class DeltaMethod(WeightMethod):
    """A method whose new weight is the base plus a change that does not depend on the base."""

    @abstractmethod
    def delta(self, target: Target, p: Tensors) -> Tensor:
        """The change, ``(*batch, out, in)``."""

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """``W + delta``, in the dtype of ``W``."""
        return self.fold(target, p, W, W, 1.0)

    def fold(self, target: Target, p: Tensors, W: Tensor, base: Tensor, weight: float) -> Tensor:
        """``W + weight * delta``."""
        return torch.add(W, self.delta(target, p).to(W.dtype), alpha=weight)

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """``y + weight * apply(x, delta)``; may reuse the memory of ``y``."""
        return torch.add(y, target.apply(x, self.delta(target, p).to(y.dtype)), alpha=weight)

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``add_to`` with weight one."""
        return self.add_to(target, p, x, y, training=training)


class LowRankMethod(DeltaMethod):
    """A method whose change is ``scale * B A``."""

    @property
    def input_dropout(self) -> float:
        """Probability of dropping entries of the input on the way to ``A``, in training."""
        return 0.0

    @abstractmethod
    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """``A``, ``B`` and the scale."""

    def added_product(self, target: Target, p: Tensors, *, training: bool = False) -> Factors | None:
        """The factors, where all that this method does to an output is to add their product of the input; else None."""
        own = type(self).add_to is LowRankMethod.add_to and type(self).forward is LowRankMethod.forward
        return self.factors(target, p) if own and not (training and self.input_dropout) else None

    def delta(self, target: Target, p: Tensors) -> Tensor:
        """``scale * B A``."""
        A, B, scale = self.factors(target, p)
        return scale * (B @ A)

    def fold(self, target: Target, p: Tensors, W: Tensor, base: Tensor, weight: float) -> Tensor:
        """``W + weight * scale * B A``, accumulated in one product."""
        A, B, scale = self.factors(target, p)
        A, B = A.to(W.dtype), B.to(W.dtype)
        if W.dim() == 2:
            return torch.addmm(W, B, A, alpha=scale * weight)
        flat = [t.reshape(-1, *t.shape[-2:]) for t in (W, B, A)]
        return torch.baddbmm(*flat, alpha=scale * weight).reshape(W.shape)

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """The fused low-rank product."""
        A, B, scale = self.factors(target, p)
        return target.add_low_rank(y, x, A, B, scale * weight, self.input_dropout if training else 0.0)


class KeyValueMethod(Method):
    """A method that puts keys and values of its own in front of those that an attention computes.

    They stand in front un-rotated, and the positions of the tokens move up by ``length``, as if the tokens had been
    read after a cache with these keys and values.

    Attributes:
        length: How many there are.
    """

    length: int

    default_targets: ClassVar[str] = "all-attention"
    adapts: ClassVar[Adapts] = "attention"
    starts_at_base: ClassVar[bool] = False
    packable: ClassVar[bool] = False

    @abstractmethod
    def keys_values(self, target: Target, p: Tensors) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``(length, width)`` with the heads side by side."""

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``y`` itself: the change has happened inside the attention."""
        return y


class InputMethod(Method):
    """A method that puts vectors of its own in front of the embedded tokens that a model reads.

    Attributes:
        length: How many there are.
        pooled: What a head or pooler that takes the first position gets: the first ``"token"``, as without them, or the
            first vector of the ``"prompt"``.
    """

    length: int
    pooled: str

    default_targets: ClassVar[str] = "all-inputs"
    adapts: ClassVar[Adapts] = "model"
    starts_at_base: ClassVar[bool] = False
    packable: ClassVar[bool] = False

    @abstractmethod
    def vectors(self, target: Target, p: Tensors) -> Tensor:
        """The vectors, ``(length, width)``."""

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``y`` itself: the change has happened on the way in."""
        return y


def _plain(value: Any) -> Any:
    """A field's value as JSON can hold it."""
    if isinstance(value, Method):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, frozenset)):
        return [_plain(v) for v in value]
    return value
