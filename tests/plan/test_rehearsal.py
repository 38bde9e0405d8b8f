"""A rehearsed step counts what a real step keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.plan import Run, architecture, count, plan
from lorakit.plan.rehearsal import Rehearsal
from tests.kept_bytes import kept_for_backward

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def rehearsal(config: Path, method: lk.LoRA | None = None) -> Rehearsal:
    base = architecture(config)
    counts = count(base.model, method or lk.LoRA(r=4))
    return Rehearsal(base.model, counts, device="cpu", dtype=torch.float32)


def kept_in_earnest(config: Path, batch: int, length: int) -> int:
    """Bytes of the storages that autograd keeps of a real step, the logits and the loss included."""
    shell = architecture(config).model
    model = type(shell)._from_config(shell.config).train()  # type: ignore[attr-defined]
    lk.attach(model, lk.LoRA(r=4))
    with kept_for_backward(model) as kept:
        ids = torch.ones(batch, length, dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(length)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum")
    return kept.bytes


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (2, 64), (5, 48)])
def test_what_is_kept_is_what_autograd_keeps(config: Path, batch: int, length: int) -> None:
    kept = rehearsal(config).train_step(batch, length).kept
    assert kept == pytest.approx(kept_in_earnest(config, batch, length), rel=0.02)


def test_the_peak_grows_with_batch_and_length_and_shrinks_with_checkpointing(config: Path) -> None:
    step = rehearsal(config).train_step
    plain, wider, longer = step(2, 32).peak, step(4, 32).peak, step(2, 64).peak
    assert plain < wider <= longer * 1.05
    assert step(2, 32, checkpointing=True).peak < 0.6 * plain
    assert step(2, 32, learnt=0.25).peak < plain
    packed = step(4, 32, packing=True).peak  # keys and values are repeated, and the pieces put together
    assert wider < packed < 1.15 * wider


def test_padding_takes_a_mask_and_repeated_keys(config: Path) -> None:
    step = rehearsal(config).train_step
    full, padded = step(4, 32), step(4, 32, padded=True)
    mask = 4 * 32 * 32 * 4  # rows, queries, keys, bytes: kept by each of the layers
    repeated = 2 * 4 * 32 * 16 * 4  # keys and values, rows, tokens, the two heads that are missing, bytes
    assert padded.kept - full.kept == pytest.approx(3 * (mask + repeated), rel=0.1)


def test_logits_that_are_made_and_not_learnt_are_part_of_the_peak(config: Path) -> None:
    config.write_text(json.dumps({**CONFIG, "vocab_size": 4096}))
    step = rehearsal(config).train_step
    few, more = (step(4, 64, learnt=0.1, selected=share).peak for share in (None, 0.9))
    assert few < more < step(4, 64).peak


def test_dropped_probabilities_of_packed_rows_are_those_of_the_documents(config: Path) -> None:
    config.write_text(json.dumps({**CONFIG, "attention_dropout": 0.1}))
    step = rehearsal(config).train_step
    assert step(4, 32, packing=True).kept == pytest.approx(step(4, 32).kept, rel=0.1)


def test_gradients_that_stay_are_part_of_the_peak(config: Path) -> None:
    step = rehearsal(config).train_step
    assert step(1, 16).peak < step(1, 16, accumulating=True).peak


def test_the_cache_of_inference(config: Path) -> None:
    found = rehearsal(config).inference(2, 64)
    assert found.kept == 3 * 2 * (2 * 8) * 2 * 64 * 4  # layers, keys and values, width, rows, tokens, bytes
    assert found.peak > found.kept


def test_dropout_of_the_adapter_keeps_nothing(config: Path) -> None:
    plain, dropped = (rehearsal(config, lk.LoRA(r=4, dropout=p)).train_step(2, 32) for p in (0.0, 0.1))
    assert plain == dropped


@pytest.mark.parametrize(
    "method",
    [
        lk.DoRA(lk.LoRA(r=4, dropout=0.1)),
        lk.VeRA(r=8),
        lk.LoKr(),
        lk.PrefixTuning(length=3),
        lk.FullFineTuning(),
    ],
)
def test_any_method_can_be_planned(config: Path, method: lk.LoRA) -> None:
    planned = plan(config, method, run=Run(batch=2, length=16, device="cpu"))
    assert planned.training is not None
    assert planned.training.activations > 0
    assert planned.training.total == planned.training.weights + planned.training.above_weights
    assert planned.counts.trainable == lk_trainable(config, method)


def lk_trainable(config: Path, method: lk.LoRA) -> int:
    shell = architecture(config).model
    model = type(shell)._from_config(shell.config)  # type: ignore[attr-defined]
    return lk.attach(model, method).trainable


def test_four_bits_take_less(config: Path) -> None:
    dense, packed = (
        plan(config, lk.LoRA(r=4), run=Run(length=16, device="cpu", storage=storage))
        for storage in ("dense", "nf4")
    )
    assert packed.weights.total < dense.weights.total
    shell = architecture(config).model
    model = type(shell)._from_config(shell.config)  # type: ignore[attr-defined]
    assert packed.weights.packed == lk.quantize(model).bytes_after


def test_refusals(config: Path) -> None:
    for wrong in (
        {"batch": 0}, {"length": True}, {"learnt": 0.0}, {"device": "tpu"}, {"dtype": "int3"},
        {"selected": 2.0}, {"written": 0}, {"padded": True, "packing": True},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Run(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="128"):
        plan(config, lk.LoRA(), run=Run(length=129))
    with pytest.raises(ConfigError, match="storage"):
        plan(config, lk.LoRA(), run=Run(length=16, storage="int4"))
