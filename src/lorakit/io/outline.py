"""What a file needs to know of a model, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lorakit.core.target import Shape


@dataclass(frozen=True)
class Transformer:
    """What PEFT's prefix and prompt files take for granted of a model of transformers.

    Attributes:
        attentions: Path of each attention, in order, to the width of all its key heads together and to their number.
        task: PEFT's word for what the model is for, as its class says it; None when the class does not.
        pools_first: Whether a head takes the first position (an encoder's), and not the last (a decoder's).
    """

    attentions: Mapping[str, tuple[int, int]]
    task: str | None
    pools_first: bool


@dataclass(frozen=True)
class Outline:
    """The parameters of a model: what PEFT's files take for granted, because PEFT never reads one without the model.

    Optional everywhere. With it, bare parameters and token rows are read and written exactly as the model has them,
    and a file is refused where PEFT would later stumble. Without it, the rules in ``docs/files.md`` decide.

    Attributes:
        sizes: Parameter path to size, in the order in which the modules hold them, shared ones under each name.
        transposed: Paths of the modules that keep their 3-D weights as ``(experts, in, out)``: those with a true
            attribute ``is_transposed`` (GPT-OSS, Aria).
        embeddings: Paths of the embedding tables' modules.
        transposed_layers: Paths of linear layers that keep their weight as ``(in, out)`` (transformers' ``Conv1D``).
        transformer: More, of a model that reads tokens.
    """

    sizes: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    transposed_layers: frozenset[str] = frozenset()
    transformer: Transformer | None = None

    @cached_property
    def owned(self) -> dict[str, list[str]]:
        """Module path to the names of its own parameters, in order."""
        owned: dict[str, list[str]] = {}
        for path in self.sizes:
            owner, _, name = path.rpartition(".")
            owned.setdefault(owner, []).append(name)
        return owned

    @cached_property
    def modules(self) -> set[str]:
        """The paths of all modules that hold parameters, or contain one that does; not of the model itself."""
        parts = [owner.split(".") for owner in self.owned if owner]
        return {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}

    def layer(self, path: str) -> Shape | None:
        """A linear layer or a convolution as a target, from the size of its weight; None when there is none.

        A linear layer is taken to be stored as ``(out, in)``, unless it is named in ``transposed_layers``.
        """
        size = self.sizes.get(f"{path}.weight")
        if size is None or len(size) < 2 or path in self.embeddings:
            return None
        if len(size) == 2:
            out, in_ = reversed(size) if path in self.transposed_layers else size
            return Shape("linear", out=out, in_=in_)
        return Shape("conv", out=size[0], in_=math.prod(size[1:]), kernel=size[2:])

    def under(self, module: str) -> list[str]:
        """The paths of all parameters in a module and its children."""
        return [path for path in self.sizes if path.startswith(module + ".")]
