"""``adapter_config.json`` as PEFT 0.21 writes it for LoRA: which keys there are, and what becomes of each.

Every key is one of: *meant* (it decides what the tensors mean, and becomes part of the methods), *kept* (it changes
nothing in what is computed, and is given back on writing), *refused* (it changes what is computed in a way that
lorakit has no method for), or unknown (from a later PEFT): accepted when empty, else refused unless ignored by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lorakit.errors import AdapterFileError, ConfigError, listing, near_matches

PEFT_VERSION = "0.21.2"
READ = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "PREFIX_TUNING", "PROMPT_TUNING", "VERA", "LORAKIT")
"""Every ``peft_type`` that is read, the last one our own form."""

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

KEPT = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
)  # fmt: skip
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Kept too, as long as they still name what the adapter has."""

REFUSED = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "a router chooses among several adapters (Arrow)",
    "kasa_config": "the base weights were truncated when it was trained, and a diagonal stands between B "
    "and A (KaSA)",
    "layer_replication": "the base model's layers were repeated, so its layer numbers are not those of the "
    "base model",
    "megatron_config": "the layers are Megatron's parallel ones",
    "monteclora_config": "its weights are sampled (MonteCLoRA)",
    "use_bdlora": "its factors are block-diagonal shards (BD-LoRA)",
    "use_qalora": "its input is pooled in groups (QALoRA)",
    "velora_config": "it was trained with compressed activations, for which lorakit has no method (VeLoRA)",
}
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_CHANGED = (
    "it changed the base weights when training began, so the file alone does not say what the model became."
)
_CONVERT = (
    f"{_CHANGED} Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)
_SUBTRACTED_INITS = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga")
_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "rank_pattern": (dict,),
    "alpha_pattern": (dict,), "use_rslora": (bool,), "use_dora": (bool,), "lora_bias": (bool,), "bias": (str,),
    "target_modules": (str, list, type(None)), "target_parameters": (list, type(None)),
    "modules_to_save": (list, type(None)), "trainable_token_indices": (list, dict, type(None)),
}  # fmt: skip


def check_config(
    config: Mapping[str, Any], ignore: Collection[str] = (), *, start_known: bool = False
) -> dict[str, Any]:
    """The configuration with every key that PEFT knows, once nothing in it is beyond us.

    Args:
        config: As read from the file; PEFT itself needs no more than ``peft_type``.
        ignore: Unknown keys to leave out of account.
        start_known: Whether the factors that PEFT took from the base when training began are at hand.

    Raises:
        AdapterFileError: A key cannot be honoured; the message names it and says why.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(
            f"adapter_config.json has peft_type {kind!r}; lorakit reads {listing(READ, most=20)}."
            f"{near_matches(str(kind), READ)}"
        )
    full = check_settings(config, DEFAULTS, REFUSED, ignore)
    init = config.get("init_lora_weights", True)
    subtracted = isinstance(init, str) and _SUBTRACTED_INITS.fullmatch(init) is not None
    harmless = any(init is value or (isinstance(value, str) and init == value) for value in HARMLESS_INITS)
    if subtracted and not start_known:
        raise AdapterFileError(
            f"The adapter has init_lora_weights={init!r}: {_CONVERT}; or read it with initial=<the folder of the "
            "adapter as it was saved before training>."
        )
    if not (harmless or subtracted):
        raise AdapterFileError(f"The adapter has init_lora_weights={init!r}: {_CONVERT}.")
    if _means_something(config.get("loftq_config")):
        raise AdapterFileError(f"The adapter has loftq_config={_short(config['loftq_config'])}: {_CONVERT}.")
    for key in ("rank_pattern", "alpha_pattern"):
        full[key] = full[key] or {}
    for key, types in _TYPES.items():
        value = full[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise AdapterFileError(
                f"adapter_config.json has {key}={_short(value)}, which is no value for it."
            )
    if full["bias"] not in ("none", "all", "lora_only"):
        raise AdapterFileError(
            f"adapter_config.json has bias={full['bias']!r}; known are 'none', 'all' and 'lora_only'."
        )
    return full


def check_settings(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    refused: Mapping[str, str],
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """A configuration with every key that PEFT has for its type, once none is refused or unknown.

    Args:
        config: As read from the file.
        defaults: Every key of the type, with PEFT's default.
        refused: Keys that must not mean anything, with the reason.
        ignore: Unknown keys to leave out of account.

    Raises:
        AdapterFileError: A key cannot be honoured; the message names it and says why.
    """
    for key, reason in refused.items():
        if _means_something(config.get(key)):
            raise AdapterFileError(
                f"The adapter has {key}={_short(config[key])}: {reason}. lorakit cannot compute it."
            )
    if _means_something(config.get("runtime_config")):
        raise AdapterFileError(
            "The adapter has a runtime_config, which PEFT never saves: the file was made by hand."
        )
    strange = [
        k
        for k, v in config.items()
        if k not in defaults and k != "runtime_config" and _means_something(v) and k not in ignore
    ]
    if strange:
        shown = listing(f"{key}={_short(config[key])}" for key in strange)
        raise AdapterFileError(
            "adapter_config.json has settings that lorakit does not know: "
            f"{shown}.{near_matches(strange[0], defaults)} Ignoring "
            "them could change what the adapter computes. If you know that it does not, read it with "
            f"ignore={tuple(strange)!r}."
        )
    return {**defaults, **{key: config[key] for key in defaults if key in config}}


def kept_settings(
    config: Mapping[str, Any], kept: Collection[str] = KEPT, defaults: Mapping[str, Any] = DEFAULTS
) -> dict[str, Any]:
    """The kept settings that are not as PEFT writes them by default; those that the type has not are passed over."""
    return {key: config[key] for key in kept if key in defaults and config[key] != defaults[key]}


def changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations in more than kept settings, as ``key: saved -> found``."""
    harmless = {*KEPT, "base_model_name_or_path"}
    keys = sorted(k for k in {*saved, *found} if k not in harmless and saved.get(k) != found.get(k))
    return [f"{key}: {_short(saved.get(key))} -> {_short(found.get(key))}" for key in keys]


def settings_error(error: ConfigError) -> AdapterFileError:
    """A method refused what the configuration says."""
    return AdapterFileError(f"adapter_config.json makes no sense: {error}")


def _means_something(value: Any) -> bool:
    return not (value is None or value is False or (isinstance(value, (str, list, dict)) and not value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
