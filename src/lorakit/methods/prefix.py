"""Prefix tuning: trained keys and values in front of those of every attention.

Source: Li and Liang 2021 (arXiv 2101.00190). The form of the training network and of the files is that of PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.method import KeyValueMethod, Method, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError

INITS = ("normal", "zero")


@register("prefix")
@dataclass(frozen=True)
class PrefixTuning(KeyValueMethod):
    """Train ``length`` keys and values for each attention; the model itself stays as it is.

    Parameters per target: ``prefix_k`` and ``prefix_v``, ``(length, width)`` each, with the width of all key heads
    together: ``2 length width`` numbers. With ``mlp`` they are made by a network while training, ``k = K tanh(H e + h)
    + k0`` and likewise ``v``: ``embedding`` ``(length, width)``, ``hidden`` ``(mlp, width)`` and ``hidden_bias``
    ``(mlp,)`` are shared by all targets, ``out_k``, ``out_v`` ``(width, mlp)`` and ``out_k_bias``, ``out_v_bias``
    ``(width,)`` belong to each. Only what the network makes is needed afterwards (`plain`).

    Unlike most methods, this one does not start from the base model's output.

    Attributes:
        length: How many keys and values stand in front.
        mlp: Width of the hidden layer of the network that makes them in training (512 in the paper, where it trained
            more stably and better than without); 0 for none.
        init: How the keys and values (with ``mlp``: the embedding) start: ``"normal"``, with variance one; or
            ``"zero"`` for all of what the attentions see, which then still takes a share of their attention.
        width: With ``mlp``, the width of ``embedding``; 0 for that of the widest keys.

    Raises:
        ConfigError: A value makes no sense.
    """

    length: int = 30
    mlp: int = 0
    init: str = "normal"
    width: int = 0

    roles: ClassVar[Mapping[str, str]] = {"hidden_bias": "bias", "out_k_bias": "bias", "out_v_bias": "bias"}

    def __post_init__(self) -> None:
        for what, value, least in (
            ("length", self.length, 1),
            ("mlp", self.mlp, 0),
            ("width", self.width, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{what} must be a whole number of at least {least}; got {value!r}.")
        if self.init not in INITS:
            raise ConfigError(f"No init of a prefix is called {self.init!r}. Known: {list(INITS)}.")
        if self.width and not self.mlp:
            raise ConfigError(
                "width is that of the training network's embedding: set mlp too, such as mlp=512."
            )

    def for_targets(self, shapes: Mapping[str, Shape]) -> PrefixTuning:
        """With ``mlp``, the width of the embedding is that of the widest keys."""
        if not self.mlp or self.width:
            return self
        return dataclasses.replace(self, width=max(shape.out for shape in shapes.values()))

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``prefix_k`` and ``prefix_v``, or with ``mlp`` the network's last layer for this target."""
        if not self.mlp:
            return {"prefix_k": (self.length, shape.out), "prefix_v": (self.length, shape.out)}
        return {
            "out_k": (shape.out, self.mlp),
            "out_k_bias": (shape.out,),
            "out_v": (shape.out, self.mlp),
            "out_v_bias": (shape.out,),
        }

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """With ``mlp``, the network's embedding and first layer."""
        if not self.mlp:
            return {}
        return {
            "embedding": (self.length, self.width),
            "hidden": (self.mlp, self.width),
            "hidden_bias": (self.mlp,),
        }

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Normal with variance one; layers as ``nn.Linear`` draws them."""
        sizes = self.shapes(target.shape)
        if self.init == "zero":
            return {name: torch.zeros(size) for name, size in sizes.items()}
        if not self.mlp:
            return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        return {name: _uniform(size, self.mlp, generator) for name, size in sizes.items()}

    def start_shared(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The embedding normal with variance one; the layer as ``nn.Linear`` draws it."""
        sizes = self.shared_shapes()
        return {
            name: torch.randn(size, generator=generator)
            if name == "embedding"
            else _uniform(size, self.width, generator)
            for name, size in sizes.items()
        }

    def keys_values(self, target: Target | Shape, p: Tensors) -> tuple[Tensor, Tensor]:
        """As they are, or as the network makes them."""
        if not self.mlp:
            return p["prefix_k"], p["prefix_v"]
        hidden = torch.tanh(F.linear(p["embedding"], p["hidden"], p["hidden_bias"]))
        return F.linear(hidden, p["out_k"], p["out_k_bias"]), F.linear(hidden, p["out_v"], p["out_v_bias"])

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[Method, Tensors]:
        """What the network makes, without the network: ``2 length width`` numbers."""
        if not self.mlp:
            return self, tensors
        keys, values = self.keys_values(shape, tensors)
        return PrefixTuning(self.length, init=self.init), {"prefix_k": keys, "prefix_v": values}

    def supports(self, target: Target) -> str | None:
        """Attentions only."""
        return None if target.shape.kind == "attention" else "a prefix stands in front of an attention's keys"


def _uniform(size: tuple[int, ...], inputs: int, generator: torch.Generator | None) -> Tensor:
    """Within ``±1/sqrt(inputs)``."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(size).uniform_(-bound, bound, generator=generator)
