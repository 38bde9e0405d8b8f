"""What a file needs to know of a model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


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
    """

    sizes: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()

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

    def under(self, module: str) -> list[str]:
        """The paths of all parameters in a module and its children."""
        return [path for path in self.sizes if path.startswith(module + ".")]
