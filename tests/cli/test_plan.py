"""``lorakit plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit, Trained


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 2,
             "n_positions": 64, "vocab_size": 100}
        )
    )  # fmt: skip
    return path


def test_table(lorakit: Lorakit, config: Path) -> None:
    outcome = lorakit("plan", config, "--r", 4, "--targets", "c_attn[q],c_attn[v]", "--length", 32)
    assert outcome.code == 0
    for word in ("1,024 of", "c_attn[q]", "gradients", "key-value cache", "Assumed:", "bfloat16"):
        assert word in outcome.out


def test_json(lorakit: Lorakit, config: Path) -> None:
    words = (
        "plan",
        config,
        "--method",
        "dora",
        "--set",
        "inner=lora",
        "--set",
        "r=2",
        "--device",
        "cpu",
        "--length",
        16,
    )
    result = json.loads(lorakit(*words, "--json").out)
    layers = 2 * (2 * (32 + 96) + 96 + 2 * (32 + 32) + 32 + 2 * 2 * (32 + 128) + 128 + 32)
    assert result["trainable"] == layers
    assert result["training"]["total"] > result["training"]["weights"] > 0
    assert result["run"]["dtype"] == "float32"


def test_the_plan_is_what_was_trained(lorakit: Lorakit, trained: Trained) -> None:
    """The folder of a real model, and the adapter that training made of the same settings."""
    planned = json.loads(lorakit("plan", trained.model, "--r", 8, "--length", 32, "--json").out)
    made = json.loads(lorakit("inspect", trained.adapter, "--json").out)
    assert planned["adapter_parameters"] == made["parameters"]
    assert planned["adapter_bytes"]["float32"] == made["bytes"]


def test_fit(lorakit: Lorakit, config: Path) -> None:
    outcome = lorakit("plan", config, "--fit", "50MB", "--length", 64)
    assert outcome.code == 0
    assert "Proposed: r=32" in outcome.out  # the largest that a layer of 32 can have
    result = json.loads(lorakit("plan", config, "--fit", "50MB", "--length", 64, "--r", 2, "--json").out)
    assert result["method"]["r"] == 2
    assert result["proposal"]["total"] <= result["usable"]
    assert "does not fit" in lorakit("plan", config, "--fit", "10kB").out


def test_listing(lorakit: Lorakit) -> None:
    assert "llama-2-7b" in lorakit("plan", "--models").out
    assert "gpt-3-175b" in json.loads(lorakit("plan", "--models", "--json").out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "no-such"), "config.json"),
        (("plan", "gpt2", "--set", "rank=3"), "no setting 'rank'"),
        (("plan", "gpt2", "--set", "r"), "KEY=VALUE"),
        (("plan", "gpt2", "--set", "r=x"), "integer"),
        (("plan", "gpt2", "--method", "lore"), "lora"),
        (("plan", "gpt2", "--targets", "q_proj"), "q_proj"),
        (("plan", "gpt2", "--length", "2048"), "1,024"),
        (("plan", "gpt2", "--fit", "much"), "24GB"),
        (("plan",), "Name a model"),
    ],
)
def test_mistakes(lorakit: Lorakit, words: tuple[str, ...], says: str) -> None:
    outcome = lorakit(*words)
    assert outcome.code == 2
    assert says in outcome.err


def test_a_rank_that_attach_refuses_is_not_counted(lorakit: Lorakit, config: Path) -> None:
    outcome = lorakit("plan", config, "--r", 999_999, "--length", 32)
    assert outcome.code != 0
    assert "r=999999 is more than a 96 x 32 matrix can have" in outcome.err.replace("\n", " ")
    assert "Choose r <= 32" in outcome.err.replace("\n", " ")
