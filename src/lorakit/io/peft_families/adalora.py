"""PEFT's ADALORA: triplets, and for pruned targets the mask of those that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.peft_config import DEFAULTS, REFUSED
from lorakit.io.peft_families.family import COMMON_KEPT, Facts, Family, PathSettings, one_value
from lorakit.io.peft_naming import number
from lorakit.methods import AdaLoRA

_SCHEDULE = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class AdaLoraFamily(Family):
    """ADALORA."""

    peft_type = "ADALORA"
    method = AdaLoRA
    defaults: ClassVar[Mapping[str, Any]] = {
        **DEFAULTS,
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "init_r": 12,
        "orth_reg_weight": 0.5,
        "peft_type": "ADALORA",
        "rank_pattern": None,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
        "total_step": None,
    }
    kept = (
        *COMMON_KEPT, "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "init_lora_weights",
        "lora_ga_config", "megatron_core", "qalora_group_size", "r", "total_step", "use_rslora",
    )  # fmt: skip
    refused: ClassVar[Mapping[str, str]] = {
        **REFUSED,
        "alpha_pattern": "PEFT itself ignores alpha_pattern in AdaLoRA",
        "lora_bias": "AdaLoRA has no bias on B",
        "target_parameters": "AdaLoRA adapts no bare parameters",
        "trainable_token_indices": "lorakit reads no token rows beside AdaLoRA",
        "use_dora": "AdaLoRA and DoRA do not go together",
        "loftq_config": "the base weights were quantised when training began",
    }
    transposes = True
    names = ("lora_A", "lora_B", "lora_E")
    bias_word = "lora_only"

    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        masks = {_bare(key): mask for key, mask in (config["rank_pattern"] or {}).items()}
        mask = masks.get(path)
        if config["rank_pattern"] and mask is None:
            raise AdapterFileError(
                f"rank_pattern has no entry for {path!r}; it has one for each other target."
            )
        alpha = config["lora_alpha"]
        return AdaLoRA(
            init_r=config["init_r"],
            target_r=config["target_r"],
            alpha=alpha if alpha > 0 else float(config["init_r"]),
            dropout=config["lora_dropout"],
            kept_r=None if mask is None else sum(map(bool, mask)),
            # PEFT's default is 0, with which no training ends at its budget; here that length is derived.
            tfinal=config["tfinal"] or None,
            **{key: config[key] for key in _SCHEDULE if key != "tfinal"},
        )

    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        return Shape("linear", out=group["lora_B"].shape[0], in_=group["lora_A"].shape[-1])

    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        first = next(iter(methods.values()))
        assert isinstance(first, AdaLoRA)
        tinit, tfinal = first.tinit or 0, first.tfinal or 0
        settings: dict[str, Any] = {
            "beta1": first.beta1,
            "beta2": first.beta2,
            "deltaT": first.deltaT,
            "init_r": first.init_r,
            "lora_alpha": number(first.alpha),
            "lora_dropout": first.dropout,
            "orth_reg_weight": first.orth_reg_weight,
            "target_r": first.target_r,
            "tfinal": tfinal,
            "tinit": tinit,
            # PEFT wants to know how long the training was, also to load what has been trained.
            "total_step": hints.get("total_step") or tinit + tfinal + 1,
        }
        if any(m.kept_r is not None for m in methods.values()):  # type: ignore[attr-defined]
            settings["rank_pattern"] = {
                f"{path}.lora_E": [i < m.rank for i in range(m.init_r)]  # type: ignore[attr-defined]
                for path, m in methods.items()
            }
        return settings

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        reasons: list[str] = []
        for what in ("init_r", "target_r", "alpha", "dropout", *_SCHEDULE):
            reasons += one_value(what, {path: getattr(m, what) for path, m in methods.items()})
        if any(m.orth_reg != "norm" for m in methods.values()):  # type: ignore[attr-defined]
            reasons.append("PEFT's AdaLoRA has the norm as its penalty, and this adapter its square")
        return reasons


def _bare(key: str) -> str:
    """The path in a key of ``rank_pattern``: ``<path>.lora_E``, as PEFT's model or its base names it."""
    path = key.removeprefix("base_model.model.").removeprefix("model.base_model.model.")
    return path[: path.index(".lora_E")] if ".lora_E" in path else path
