"""Whether several adapters can be computed with together: same base, same shapes, finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.adapters.change import require_finite
from lorakit.core import AdapterState, Shape
from lorakit.errors import ConfigError

_SELECTION = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
)


class Together:
    """Adapters of one base model, checked.

    Attributes:
        states: The adapters.
        shapes: The targets of all of them, in the order of the first adapter that has each.
        base: The name of their base model, if any of them says it.

    Raises:
        ConfigError: They name different bases, a target has two shapes, or a tensor holds a NaN or an infinity.
    """

    def __init__(self, states: Sequence[AdapterState], *, any_base: bool = False) -> None:
        self.states = states
        for n, state in enumerate(states, 1):
            require_finite(state, f"Adapter {n} of {len(states)}")
        bases = list(dict.fromkeys(state.spec.base for state in states if state.spec.base))
        if len({_last_part(base) for base in bases}) > 1 and not any_base:
            raise ConfigError(
                f"The adapters were made for different base models: {' and '.join(map(repr, bases))}. Their changes do "
                "not belong to the same weights. If the names mean the same model, pass any_base=True (`--any-base`)."
            )
        self.base = bases[0] if bases else None
        self.shapes: dict[str, Shape] = {}
        for n, state in enumerate(states, 1):
            for path, shape in state.spec.shapes.items():
                known = self.shapes.setdefault(path, shape)
                if known != shape:
                    raise ConfigError(
                        f"{path!r} is a {known.kind} of {known} in one adapter and a {shape.kind} of {shape} in "
                        f"adapter {n}: they belong to different models."
                    )

    def holders(self, path: str) -> list[int]:
        """Which of the adapters have a target."""
        return [i for i, state in enumerate(self.states) if path in state.spec.methods]

    def info(self, how: str, weights: Sequence[float]) -> dict[str, Any]:
        """What the adapters' own information agrees on, and how they were combined."""
        kept = _agreed([state.spec.info for state in self.states])
        peft = _agreed([_peft(state) for state in self.states])
        if any(set(state.spec.methods) != set(self.shapes) for state in self.states):
            peft = {key: value for key, value in peft.items() if key not in _SELECTION}
        for key in (
            "transposed",
            "whole_tables",
        ):  # facts of the base, each of which some adapter had to know
            known = {path for state in self.states for path in _peft(state).get(key, ())}
            if known:
                peft[key] = sorted(known)
        peft.pop("init_lora_weights", None)
        kept.pop("peft", None)
        made = {"combined": {"how": how, "weights": list(weights)}} if len(self.states) > 1 else {}
        return {**kept, **({"peft": peft} if peft else {}), **made}


def _peft(state: AdapterState) -> Mapping[str, Any]:
    found = state.spec.info.get("peft", {})
    return found if isinstance(found, Mapping) else {}


def _agreed(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: v for key, v in infos[0].items() if all(key in other and other[key] == v for other in infos)}


def _last_part(base: str) -> str:
    """``model`` of ``org/model`` and of ``/folder/model``: where a model lies is not which it is."""
    return base.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
