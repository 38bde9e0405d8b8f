"""PEFT's VERA: two vectors a target, and the projections once a file, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.peft_families.family import COMMON, COMMON_KEPT, Facts, Family, PathSettings, one_value
from lorakit.methods import VeRA


class VeraFamily(Family):
    """VERA."""

    peft_type = "VERA"
    method = VeRA
    defaults: ClassVar[Mapping[str, Any]] = {
        **COMMON,
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "peft_type": "VERA",
        "projection_prng_key": 0,
        "r": 256,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    kept = (*COMMON_KEPT, "fan_in_fan_out", "init_weights", "save_projection")
    transposes = True
    names = ("vera_lambda_d", "vera_lambda_b")
    shared = ("vera_A", "vera_B")
    bias_word = "vera_only"

    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        return VeRA(
            r=config["r"],
            d_initial=config["d_initial"] or 0.1,
            projection_seed=config["projection_prng_key"],
            dropout=config["vera_dropout"],
        )

    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        return Shape("linear", out=group["vera_lambda_b"].shape[-1], in_=0 if known is None else known.in_)

    def start_shared(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        if any(not shape.in_ for shape in shapes.values()):
            raise AdapterFileError(
                "The file leaves VeRA's projections out (save_projection=False), and how wide they are only the model "
                "can tell: load the adapter onto it with lorakit.load(model, ...)."
            )
        first = next(iter(methods.values()))
        return first.for_targets(shapes).start_shared(None)

    def completed(self, method: Method, shared: Mapping[str, Tensor]) -> Method:
        assert isinstance(method, VeRA)
        return dataclasses.replace(
            method, max_in=shared["vera_A"].shape[-1], max_out=shared["vera_B"].shape[0]
        )

    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        first = next(iter(methods.values()))
        assert isinstance(first, VeRA)
        return {
            "d_initial": first.d_initial,
            "projection_prng_key": first.projection_seed,
            "r": first.r,
            "save_projection": True,
            "vera_dropout": first.dropout,
        }

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        reasons: list[str] = []
        for what in ("r", "d_initial", "projection_seed", "dropout"):
            reasons += one_value(what, {path: getattr(m, what) for path, m in methods.items()})
        first = next(iter(methods.values()))
        assert isinstance(first, VeRA)
        largest = (max(s.in_ for s in shapes.values()), max(s.out for s in shapes.values()))
        if all(s.in_ for s in shapes.values()) and largest != (first.max_in, first.max_out):
            reasons.append(
                f"PEFT makes the projections for the largest targets ({largest[1]} x {largest[0]}); these are for "
                f"{first.max_out} x {first.max_in}"
            )
        return reasons
