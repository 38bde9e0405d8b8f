"""PEFT's IA3: one vector a target, for its outputs or, in the feed-forward layers, its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.core.expressions import expression
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.peft_families.family import COMMON, COMMON_KEPT, Facts, Family, PathSettings
from lorakit.io.peft_rules import natural
from lorakit.methods import IA3


class Ia3Family(Family):
    """IA3."""

    peft_type = "IA3"
    method = IA3
    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "peft_type": "IA3",
    }
    kept = (*COMMON_KEPT, "fan_in_fan_out", "init_ia3_weights")
    transposes = True
    names = ("ia3_l",)
    kinds = ("linear", "conv")

    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        return IA3(feedforward=(), side="input" if _named(path, config["feedforward_modules"]) else "output")

    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        assert isinstance(method, IA3)
        size = tuple(group["ia3_l"].shape)
        if len(size) > 2:
            if known is None or known.kind != "conv":
                raise AdapterFileError(
                    f"{path!r} is a convolution whose kernel the file does not say: load the adapter onto the model "
                    "with lorakit.load(model, ...)."
                )
            return known
        n = size[0] if method.side == "output" else size[-1]
        if known is not None:
            return known
        return Shape("linear", out=n, in_=0) if method.side == "output" else Shape("linear", out=0, in_=n)

    def in_file(
        self, method: Method, sizes: Mapping[str, tuple[int, ...]], shape: Shape
    ) -> dict[str, tuple[int, ...]]:
        assert isinstance(method, IA3)
        (n,) = sizes["ia3_l"]
        if shape.kind == "conv":
            return {"ia3_l": (1, n, *(1 for _ in shape.kernel))}
        return {"ia3_l": (n, 1) if method.side == "output" else (1, n)}

    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        inputs = [path for path, m in methods.items() if m.side == "input"]  # type: ignore[attr-defined]
        given = hints.get("feedforward_modules")
        if given is not None and all(_named(path, given) == (path in inputs) for path in methods):
            return {"feedforward_modules": given}
        if not inputs:
            return {"feedforward_modules": []}
        # An expression: PEFT wants a list here to be a part of the list in target_modules.
        last = sorted({path.rpartition(".")[2] for path in inputs})
        if any(path.rpartition(".")[2] in last for path in methods if path not in inputs):
            return {"feedforward_modules": "|".join(re.escape(path) for path in sorted(inputs, key=natural))}
        return {"feedforward_modules": rf"(?:.*\.)?(?:{'|'.join(map(re.escape, last))})"}

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        odd = [path for path, shape in shapes.items() if len(shape.kernel) == 1]
        return (
            [f"PEFT has IA3 for convolutions in two and three dimensions, not as {odd[0]!r}"] if odd else []
        )


def _named(path: str, entries: Any) -> bool:
    """Whether PEFT's ``feedforward_modules`` name a path: a list of endings, or an expression for the whole."""
    if isinstance(entries, str):
        return expression(entries).matches(path)
    return any(path.endswith(entry) for entry in entries or ())
