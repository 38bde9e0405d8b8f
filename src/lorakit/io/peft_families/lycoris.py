"""PEFT's LOHA and LOKR: the names and sizes are those of the methods here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.core.endings import smallest_pattern
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.peft_families.family import (
    COMMON,
    COMMON_KEPT,
    Facts,
    Family,
    PathSettings,
    matrix,
    one_value,
)
from lorakit.io.peft_naming import number
from lorakit.methods import LoHa, LoKr

_RANKED: dict[str, Any] = {
    **COMMON,
    "alpha": 8,
    "alpha_pattern": {},
    "exclude_modules": None,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "module_dropout": 0.0,
    "r": 8,
    "rank_dropout": 0.0,
    "rank_pattern": {},
    "use_effective_conv2d": False,
}
_KEPT = (*COMMON_KEPT, "module_dropout", "rank_dropout")


class _Lycoris(Family):
    """What both have in common: kernels may have cores."""

    def in_file(
        self, method: Method, sizes: Mapping[str, tuple[int, ...]], shape: Shape
    ) -> dict[str, tuple[int, ...]]:
        """PEFT keeps the core of a convolution in one dimension with a second one of size one."""
        one = len(shape.kernel) == 1
        return {name: (*size, 1) if one and name[-2] == "t" else size for name, size in sizes.items()}


class LoHaFamily(_Lycoris):
    """LOHA."""

    peft_type = "LOHA"
    method = LoHa
    defaults: ClassVar[Mapping[str, Any]] = {**_RANKED, "peft_type": "LOHA"}
    kept = _KEPT
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    kinds = ("linear", "conv")

    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        return LoHa(
            r=patterns.ranks[path],
            alpha=patterns.alphas[path],
            tucker=config["use_effective_conv2d"],
        )

    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        a, b = group["hada_w1_a"], group["hada_w1_b"]
        if "hada_t1" in group:  # a core lies between (r, out) and (r, channels)
            kernel = _kernel(group["hada_t1"], known)
            return Shape("conv", out=a.shape[-1], in_=b.shape[-1] * math.prod(kernel), kernel=kernel)
        return matrix(a.shape[0], b.shape[-1], known)

    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {**_ranked(methods), "init_weights": hints.get("init_weights", True)}

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        return _one_tucker(methods) + _one_or_two_dimensions(shapes)


class LoKrFamily(_Lycoris):
    """LOKR."""

    peft_type = "LOKR"
    method = LoKr
    defaults: ClassVar[Mapping[str, Any]] = {
        **_RANKED,
        "decompose_both": False,
        "decompose_factor": -1,
        "peft_type": "LOKR",
        "rank_dropout_scale": False,
    }
    kept = (*_KEPT, "rank_dropout_scale")
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    kinds = ("linear", "conv")

    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        return LoKr(
            r=patterns.ranks[path],
            alpha=patterns.alphas[path],
            factor=config["decompose_factor"],
            decompose_both=config["decompose_both"],
            init="lycoris" if config["init_weights"] == "lycoris" else "peft",
            tucker=config["use_effective_conv2d"],
        )

    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        if not ({"lokr_w1"} <= set(group) or {"lokr_w1_a", "lokr_w1_b"} <= set(group)):
            raise AdapterFileError(f"{path!r} has neither lokr_w1 nor lokr_w1_a with lokr_w1_b.")
        if not ({"lokr_w2"} <= set(group) or {"lokr_w2_a", "lokr_w2_b"} <= set(group)):
            raise AdapterFileError(f"{path!r} has neither lokr_w2 nor lokr_w2_a with lokr_w2_b.")
        whole = group.get("lokr_w1")
        a, c = (
            whole.shape[:2]
            if whole is not None
            else (group["lokr_w1_a"].shape[0], group["lokr_w1_b"].shape[-1])
        )
        kernel: tuple[int, ...] = ()
        if "lokr_w2" in group:
            b, d, *rest = group["lokr_w2"].shape
            kernel = tuple(rest)
        elif "lokr_t2" in group:
            b, d = group["lokr_w2_a"].shape[-1], group["lokr_w2_b"].shape[-1]
            kernel = _kernel(group["lokr_t2"], known)
        else:
            b, d = group["lokr_w2_a"].shape[0], group["lokr_w2_b"].shape[-1]
        if kernel:
            return Shape("conv", out=a * b, in_=c * d * math.prod(kernel), kernel=kernel)
        return matrix(a * b, c * d, known)

    def for_shape(self, method: Method, shape: Shape) -> Method:
        """PEFT takes a factor that divides a size for the size of ``W1``, also where it is the larger of the two."""
        assert isinstance(method, LoKr)
        theirs = dataclasses.replace(method, first="factor")
        return method if theirs.shapes(shape) == method.shapes(shape) else theirs

    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        first = next(iter(methods.values()))
        assert isinstance(first, LoKr)
        return {
            **_ranked(methods),
            "decompose_both": first.decompose_both,
            "decompose_factor": first.factor,
            "init_weights": "lycoris" if first.init == "lycoris" else hints.get("init_weights", True),
        }

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        reasons = _one_tucker(methods) + _one_or_two_dimensions(shapes)
        for what in ("factor", "decompose_both", "init"):
            reasons += one_value(what, {path: getattr(m, what) for path, m in methods.items()})
        turned = [path for path, m in methods.items() if self.for_shape(m, shapes[path]) != m]
        if turned:
            reasons.append(
                f"PEFT takes the larger number for W1 where the factor is larger than the other, as at {turned[0]!r}; "
                "this adapter takes the smaller (first='smaller')"
            )
        if any(m.scaling != "peft" for m in methods.values()):  # type: ignore[attr-defined]
            reasons.append("PEFT scales every target by alpha / r; this adapter has LyCORIS's scaling")
        return reasons


def _kernel(core: Tensor, known: Shape | None) -> tuple[int, ...]:
    """The kernel that a core was made for; a second dimension of size one may be PEFT's addition."""
    size = tuple(core.shape[2:])
    return known.kernel if known is not None and (*known.kernel, 1) == size else size


def _ranked(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Rank and alpha, and whether kernels have cores."""
    r, rank_pattern = smallest_pattern({path: m.r for path, m in methods.items()})  # type: ignore[attr-defined]
    alpha, alpha_pattern = smallest_pattern({path: number(m.alpha) for path, m in methods.items()})  # type: ignore[attr-defined]
    return {
        "alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "r": r,
        "rank_pattern": rank_pattern,
        "use_effective_conv2d": any(m.tucker for m in methods.values()),  # type: ignore[attr-defined]
    }


def _one_tucker(methods: Mapping[str, Method]) -> list[str]:
    return one_value("form of convolutions (tucker)", {path: m.tucker for path, m in methods.items()})  # type: ignore[attr-defined]


def _one_or_two_dimensions(shapes: Mapping[str, Shape]) -> list[str]:
    odd = [path for path, shape in shapes.items() if len(shape.kernel) > 2]
    return (
        [f"PEFT has this type for convolutions in one and two dimensions, not as {odd[0]!r}"] if odd else []
    )
