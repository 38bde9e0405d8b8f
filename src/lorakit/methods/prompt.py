"""Prompt tuning: trained vectors in front of the embedded tokens.

Source: Lester et al. 2021 (arXiv 2104.08691). The form of the files is that of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import InputMethod, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError, near_matches

INITS = ("vocab", "uniform", "normal")
POOLED = ("token", "prompt")


@register("prompt")
@dataclass(frozen=True)
class PromptTuning(InputMethod):
    """Train ``length`` vectors that the model reads before the tokens; the model itself stays as it is.

    One target, the model's input, with one parameter: ``prompt`` ``(length, width)``. Whoever calls the model sees
    inputs and outputs of the tokens alone. Unlike most methods, this one does not start from the base model's output.

    Attributes:
        length: How many vectors.
        init: How they start: ``"vocab"``, the vectors of tokens drawn from the vocabulary; ``"uniform"``, between -0.5
            and 0.5 (the paper's random start); ``"normal"``, with variance one (PEFT's).
        init_ids: Token ids whose vectors they start from instead, such as those of a text that says the task; repeated
            or cut to ``length``.
        pooled: What a head or pooler gets that takes the first position, as BERT's do: the first ``"token"``, as
            without a prompt, or the first vector of the ``"prompt"``, as in PEFT's classifiers. In a decoder it means
            nothing.

    Raises:
        ConfigError: A value makes no sense.
    """

    length: int = 20
    init: str = "vocab"
    init_ids: tuple[int, ...] = ()
    pooled: str = "token"

    roles: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ConfigError(f"length must be a whole number of at least 1; got {self.length!r}.")
        for what, value, known in (("init", self.init, INITS), ("pooled", self.pooled, POOLED)):
            if value not in known:
                raise ConfigError(
                    f"No {what} of a prompt is called {value!r}.{near_matches(str(value), known)} Known: {list(known)}."
                )
        try:
            ids = tuple(index(i) for i in self.init_ids)
        except TypeError:
            raise ConfigError(
                f"init_ids are token ids, whole numbers; got {str(self.init_ids)[:80]}."
            ) from None
        object.__setattr__(self, "init_ids", ids)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``prompt``, ``(length, width)``."""
        return {"prompt": (self.length, shape.out)}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Vectors of tokens, or random ones."""
        size = self.shapes(target.shape)["prompt"]
        if self.init == "uniform" and not self.init_ids:
            return {"prompt": torch.empty(size).uniform_(-0.5, 0.5, generator=generator)}
        if self.init == "normal" and not self.init_ids:
            return {"prompt": torch.randn(size, generator=generator)}
        ids = torch.randint(target.in_, (self.length,), generator=generator)
        if self.init_ids:
            repeats = -(-self.length // len(self.init_ids))
            ids = torch.tensor((self.init_ids * repeats)[: self.length])
        rows = target.weight().mT[ids.to(target.stored.device)]
        return {"prompt": rows.to(torch.promote_types(rows.dtype, torch.float32))}

    def vectors(self, target: Target, p: Tensors) -> Tensor:
        """As they are."""
        return p["prompt"]

    def supports(self, target: Target) -> str | None:
        """A model's input only, and ids that it knows."""
        if target.shape.kind != "model":
            return "a prompt stands in front of the tokens that a model reads"
        odd = [i for i in self.init_ids if not 0 <= i < target.in_]
        return f"init_ids has the token {odd[0]}, and there are {target.in_}" if odd else None
