"""The configuration: the keys of the installed PEFT, and what becomes of each."""

from __future__ import annotations

import pytest

from lorakit.errors import AdapterFileError
from lorakit.io.peft_config import DEFAULTS, KEPT, REFUSED, SELECTION, changes, check_config, kept_settings

BASE = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}


def test_keys_and_defaults_are_those_of_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    import json

    peft.LoraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    if written["peft_version"] != DEFAULTS["peft_version"]:
        pytest.skip(
            f"the keys are those of {DEFAULTS['peft_version']}; installed is {written['peft_version']}"
        )
    assert written == {**DEFAULTS, "inference_mode": False}  # PEFT switches it when it saves a model


def test_every_key_has_a_fate() -> None:
    meant = {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
    fates = [*meant, *KEPT, *SELECTION, *REFUSED]
    assert sorted(fates) == sorted(DEFAULTS)


def test_the_least_that_loads() -> None:
    config = check_config({"peft_type": "LORA"})
    assert config == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 4]]),
        ("arrow_config", {"top_k": 3}),
        ("velora_config", {"group": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("kasa_config", {"beta": 1}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "new"),
        ("init_lora_weights", None),
        ("loftq_config", {"loftq_bits": 4}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("bias", "some"),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("use_dora", "yes"),
        ("modules_to_save", "head"),
        ("target_parameters", "x"),
        ("trainable_token_indices", 3),
        ("target_modules", 5),
    ],
)
def test_what_cannot_be_honoured_is_named(key: str, value: object) -> None:
    with pytest.raises(AdapterFileError, match=key):
        check_config({**BASE, key: value})


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", None, "LORa", 3])
def test_other_kinds_of_adapter(kind: object) -> None:
    with pytest.raises(AdapterFileError, match="peft_type"):
        check_config({**BASE, "peft_type": kind})


@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_unknown_and_empty_is_fine(empty: object) -> None:
    assert check_config({**BASE, "use_newlora": empty}) == {**DEFAULTS, **BASE}


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "x", [0], {"a": None}])
def test_unknown_with_a_meaning_is_refused_unless_ignored(value: object) -> None:
    with pytest.raises(AdapterFileError, match=r"use_newlora.*ignore=\('use_newlora',\)"):
        check_config({**BASE, "use_newlora": value})
    assert check_config({**BASE, "use_newlora": value}, ignore=("use_newlora",)) == {**DEFAULTS, **BASE}


def test_a_known_refusal_cannot_be_ignored() -> None:
    with pytest.raises(AdapterFileError, match="QALoRA"):
        check_config({**BASE, "use_qalora": True}, ignore=("use_qalora",))


def test_a_misspelt_key_is_hinted_at() -> None:
    with pytest.raises(AdapterFileError, match="Did you mean 'lora_alpha'"):
        check_config({**BASE, "lora_alfa": 3})


def test_kept_settings_are_those_off_the_default() -> None:
    config = check_config(
        {
            **BASE,
            "task_type": "CAUSAL_LM",
            "revision": None,
            "peft_version": "0.9.0",
            "eva_config": {"rho": 2},
            "init_lora_weights": "eva",
        }
    )
    assert kept_settings(config) == {
        "task_type": "CAUSAL_LM",
        "peft_version": "0.9.0",
        "eva_config": {"rho": 2},
    }


def test_changes_name_what_matters_only() -> None:
    before = check_config(BASE)
    assert changes(before, {**before, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x"}) == []
    assert changes(before, {**before, "lora_alpha": 8}) == ["lora_alpha: 4 -> 8"]
