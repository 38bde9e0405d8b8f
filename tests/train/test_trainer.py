"""Training: it learns, it is exact, and it goes on where it was stopped."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.errors import ConfigError, DataError, TrainingError
from lorakit.train import Recipe, TrainResult, read_metrics, train
from lorakit.train.loss import mean_loss
from lorakit.train.progress import Silent, StepReport
from lorakit.train.run_files import checkpoints
from tests.tiny_chat import colour_rows, write_rows

MakeRecipe = Callable[..., Recipe]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state = lk.read(folder)
    return {f"{path}.{name}": t for path, group in state.tensors.items() for name, t in group.items()}


def assert_equal(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAt(Silent):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, report: StepReport) -> None:
        if report.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def assert_resumes(make: Callable[[str], Recipe], stop: int) -> TrainResult:
    """A run that is stopped after a step and resumed equals the uninterrupted one, which is returned.

    Args:
        make: From the name of an output folder to the recipe.
        stop: The step.
    """
    whole = train(make("whole"))
    train(make("parts"), progress=StopAt(stop))
    resumed = train(make("parts"), resume=True)
    assert resumed.losses == whole.losses
    assert_equal(resumed.adapter, whole.adapter)
    return whole


def test_it_learns_and_leaves_everything(recipe: MakeRecipe) -> None:
    result = train(recipe(max_steps=60, log_every=10, lr=1e-2))
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert result.steps == 60
    assert result.learnt_tokens < result.tokens
    assert not result.model.training
    folder = result.folder
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[0]["loss"] == pytest.approx(sum(result.losses[:10]) / 10, rel=0.05)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["ended"]["how"] == "finished"
    assert run["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert run["recipe"]["train"]["lr"] == 1e-2
    assert run["data"]["rows"] == 24
    assert Recipe.from_mapping(run["recipe"]).plain() == run["recipe"]
    if result.plot is not None:
        assert result.plot.read_bytes().startswith(b"\x89PNG")
    saved = lk.read(result.adapter)
    live = lk.extract(result.model)
    for path, group in live.tensors.items():
        for name, tensor in group.items():
            assert torch.equal(saved.tensors[path][name], tensor)


def test_same_seed_same_file_and_other_seeds_differ(recipe: MakeRecipe) -> None:
    one, two, three = (
        train(recipe(name, seed=seed, max_steps=3)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    weights = "adapter_model.safetensors"
    assert (one.adapter / weights).read_bytes() == (two.adapter / weights).read_bytes()
    assert (one.adapter / weights).read_bytes() != (three.adapter / weights).read_bytes()


def test_the_three_seeds_are_apart(recipe: MakeRecipe) -> None:
    def start(**seeds: int) -> torch.Tensor:
        result = train(recipe("s", max_steps=1, lr=1e-12, **seeds), overwrite=True)
        return tensors(result.adapter)["model.layers.0.self_attn.q_proj.lora_A"]

    assert torch.allclose(start(seed=1), start(seed=2, init_seed=1))
    assert not torch.allclose(start(seed=1), start(seed=1, init_seed=2))
    assert torch.allclose(start(seed=1), start(seed=1, data_seed=2, dropout_seed=3))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_accumulation_equals_one_large_batch(recipe: MakeRecipe, batching: str, tmp_path: Path) -> None:
    # Answers of different lengths: the mean of batch means would not be the mean over tokens. The order of the rows is
    # that of the plan, so padded batches are made of equal groups by one length each.
    rows = [{"prompt": str(i), "completion": "y" * (1 + i % 5)} for i in range(20)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    settings = {
        "epochs": 1,
        "max_steps": None,
        "max_grad_norm": 0,
        "batching": batching,
        "sections": {"data": data},
    }
    split = train(recipe("split", batch_rows=4, accumulation=5, **settings))
    whole = train(recipe("whole", batch_rows=20, accumulation=1, **settings))
    assert split.steps == whole.steps == 1
    assert split.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
    for name, tensor in tensors(whole.adapter).items():
        assert torch.allclose(tensors(split.adapter)[name], tensor, atol=1e-4), name


def test_the_last_short_window_is_a_mean_over_its_own_tokens(recipe: MakeRecipe) -> None:
    # 24 rows in batches of 4 make 6 batches: windows of 4 and of 2. With hardly a step in between, both means together
    # are the mean over all rows, weighted by their tokens.
    short = train(recipe("short", epochs=1, max_steps=None, accumulation=4, lr=1e-12, log_every=1))
    whole = train(recipe("whole", epochs=1, max_steps=None, batch_rows=24, lr=1e-12))
    lines = read_metrics(short.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["learnt_tokens"] < lines[0]["learnt_tokens"]
    mean = sum(line["loss"] * line["learnt_tokens"] for line in lines) / sum(
        line["learnt_tokens"] for line in lines
    )
    assert mean == pytest.approx(whole.losses[0], rel=1e-5)


def test_packed_and_padded_runs_agree(recipe: MakeRecipe) -> None:
    settings: dict[str, Any] = {"epochs": 1, "max_steps": None, "batch_rows": 24}
    one = train(recipe("packed", batching="packed", **settings))
    two = train(recipe("padded", batching="padded", **settings))
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


def test_batches_by_tokens(recipe: MakeRecipe) -> None:
    result = train(recipe(epochs=1, max_steps=None, batch_rows=None, batch_tokens=300))
    assert result.steps >= result.tokens / 300
    assert result.steps > train(recipe("whole", epochs=1, max_steps=None, batch_rows=24)).steps


# ---- stopping and going on -----------------------------------------------------------------------------------------
STOPPED: dict[str, Any] = {
    "max_steps": 9,
    "log_every": 4,
    "accumulation": 2,
    "save_every": 3,
    "sections": {"adapter": {"r": 4, "dropout": 0.3}},
}


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
@pytest.mark.parametrize("stop", [1, 5])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(recipe: MakeRecipe, stop: int) -> None:
    whole = train(recipe("whole", **STOPPED))
    stopped = train(recipe("parts", **STOPPED), progress=StopAt(stop))
    assert stopped.stopped_by == "interrupt"
    assert stopped.steps == stop
    resumed = train(recipe("parts", **STOPPED), resume=True)
    assert resumed.steps == 9
    assert resumed.losses == whole.losses
    assert_equal(resumed.adapter, whole.adapter)

    def without_time(folder: Path) -> list[dict[str, Any]]:
        lines = read_metrics(folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if "second" not in k and k != "peak_memory"} for line in lines]

    assert without_time(resumed.folder) == without_time(whole.folder)
    assert (resumed.tokens, resumed.learnt_tokens) == (whole.tokens, whole.learnt_tokens)


def test_a_run_that_was_killed_resumes_bit_for_bit(recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = train(recipe("whole", **STOPPED))
    plan = recipe("killed", **STOPPED)
    (tmp_path / "plan.json").write_text(json.dumps(plan.plain()), encoding="utf-8")
    script = """
        import json, os, signal, sys
        from lorakit.train import Recipe, Silent, train
        class Kill(Silent):
            def step(self, report):
                if report.step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
        train(Recipe.from_mapping(json.load(open(sys.argv[1]))), progress=Kill())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "plan.json")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(plan.output)] == ["checkpoint-3", "checkpoint-6"]
    resumed = train(recipe("killed", **STOPPED), resume=True)
    assert resumed.losses == whole.losses
    assert_equal(resumed.adapter, whole.adapter)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(recipe: MakeRecipe) -> None:
    result = train(recipe(**STOPPED))
    checkpoint = checkpoints(result.folder)[-1]
    assert checkpoint.name == "checkpoint-9"
    assert_equal(checkpoint, result.adapter)
    assert not (checkpoint / "model.safetensors").exists()
    assert len(checkpoints(result.folder)) == 2  # keep_checkpoints


def test_half_a_checkpoint_is_passed_over(recipe: MakeRecipe) -> None:
    result = train(recipe(**STOPPED))
    (checkpoints(result.folder)[-1] / "trainer_state.json").write_text('{"global', encoding="utf-8")
    assert [path.name for path in checkpoints(result.folder)] == ["checkpoint-6"]


def test_resume_refuses_another_recipe_or_other_data(recipe: MakeRecipe, tmp_path: Path) -> None:
    train(recipe(**STOPPED))
    with pytest.raises(ConfigError, match=r"train\.lr changed"):
        train(recipe(**{**STOPPED, "lr": 0.5}), resume=True)
    write_rows(tmp_path / "train.jsonl", colour_rows(23))
    with pytest.raises(ConfigError, match="training data is not what"):
        train(recipe(**STOPPED), resume=True)


def test_resume_without_a_checkpoint(recipe: MakeRecipe) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(recipe(), resume=True)


def test_time_limit_saves_and_can_be_resumed(recipe: MakeRecipe) -> None:
    result = train(recipe(max_seconds=1e-6))
    assert (result.stopped_by, result.steps) == ("max_seconds", 1)
    assert result.adapter.is_dir()
    again = train(recipe(), resume=True)
    assert again.steps == 6
    assert again.losses == train(recipe("whole")).losses


# ---- what is refused -----------------------------------------------------------------------------------------------
def test_an_output_with_a_run_is_not_overwritten_unasked(recipe: MakeRecipe) -> None:
    first = train(recipe(**{**STOPPED, "max_steps": 4}))
    with pytest.raises(ConfigError, match=r"holds a run already \(finished\).*--overwrite"):
        train(recipe())
    assert first.adapter.is_dir()
    train(recipe(), overwrite=True)
    assert checkpoints(first.folder) == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(recipe: MakeRecipe) -> None:
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) in step \d+.*Lower train\.lr"):
        train(recipe(max_steps=30, lr=1e30, max_grad_norm=0, warmup=0))
    folder = recipe().output
    record = json.loads((folder / "bad_batch.json").read_text(encoding="utf-8"))
    tensors_kept = load_file(folder / record["tensors"])
    (rows,) = record["batches"]
    assert [row["id"] for row in rows] == [f"train.jsonl:{row['row'] + 1}" for row in rows]
    assert tensors_kept["input_ids"].numel() == sum(row["length"] for row in rows)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["ended"]["how"] == "error"
    assert not (folder / "adapter").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_adapter(recipe: MakeRecipe) -> None:
    from lorakit.models import load_model

    made = recipe(accumulation=2, max_steps=4, save_every=1)
    model = load_model(made.model.name)
    passes = []

    def spoil(module: torch.nn.Module, gradients: Any, outputs: Any) -> Any:
        passes.append(1)
        return None if len(passes) < 6 else tuple(g * float("nan") for g in gradients)

    model.model.layers[1].register_full_backward_hook(spoil)
    with pytest.raises(TrainingError, match=r"gradient became nan in step 3.*Lower train\.lr"):
        train(made, model=model)
    record = json.loads((made.output / "bad_batch.json").read_text(encoding="utf-8"))
    assert (record["step"], len(record["batches"])) == (3, 2)
    kept = load_file(made.output / record["tensors"])
    assert {"0.input_ids", "1.input_ids"} <= kept.keys()
    assert all(t.isfinite().all() for t in tensors(checkpoints(made.output)[-1]).values())


def test_activation_checkpointing_leaves_nothing_behind(recipe: MakeRecipe) -> None:
    """Transformers makes the inputs require a gradient, so backward would go on below the lowest adapter."""
    from lorakit.models import load_model

    made = recipe(
        max_steps=1,
        activation_checkpointing=True,
        sections={"adapter": {"r": 2, "targets": r".*layers\.1\..*proj"}},
    )
    model = load_model(made.model.name)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(out.requires_grad))
    train(made, model=model)
    assert seen
    assert not any(seen)  # neither while it is on
    embedded = model.get_input_embeddings()(torch.tensor([[3, 4]]))
    assert not embedded.requires_grad  # nor after
    model.enable_input_require_grads()  # what the caller had asked for stays
    sections = {"adapter": {"name": "b", "r": 2}}
    train(recipe("again", max_steps=1, activation_checkpointing=True, sections=sections), model=model)
    assert model.get_input_embeddings()(torch.tensor([[3, 4]])).requires_grad


def test_nothing_is_written_when_the_data_is_bad(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe()
    (tmp_path / "train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        train(made)
    assert not made.output.exists()


def test_packed_is_refused_by_name_where_it_is_not_exact(recipe: MakeRecipe) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ConfigError, match="BloomForCausalLM"):
        train(recipe(batching="packed", sections={"adapter": {"r": 2}}), model=model)
    result = train(recipe(max_steps=1), model=model)
    assert result.steps == 1


def test_rows_longer_than_the_model_reads(recipe: MakeRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "x" * 1100, "completion": "y"}])
    with pytest.raises(ConfigError, match="the model reads at most 1024"):
        train(recipe(max_length=2000))


# ---- the rest ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora", "r": 2},
        {"method": "full", "targets": ["lm_head"]},
        {"groups": {"q_proj": {"r": 2}, "norm": {"method": "full"}}},
    ],
)
def test_other_methods_train_save_and_resume(recipe: MakeRecipe, adapter: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_every": 2, "sections": {"adapter": adapter}}
    whole = train(recipe("whole", **settings))
    assert whole.losses[-1] != whole.losses[0]
    train(recipe("parts", **settings), progress=StopAt(3))
    assert_equal(train(recipe("parts", **settings), resume=True).adapter, whole.adapter)


def test_activation_checkpointing_changes_nothing(recipe: MakeRecipe) -> None:
    plain, checkpointed = train(recipe("a")), train(recipe("b", activation_checkpointing=True))
    assert plain.losses == pytest.approx(checkpointed.losses, rel=1e-6)


def test_valid_loss_is_measured_by_the_way(recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "train.jsonl")}
    result = train(recipe(eval_every=2, sections={"data": data}))
    found = [
        (line["step"], line["valid_loss"])
        for line in read_metrics(result.folder / "metrics.jsonl")
        if "valid_loss" in line
    ]
    assert [step for step, _ in found] == [2, 4, 6]
    assert result.valid_loss == found[-1][1]
    assert result.losses == train(recipe("without")).losses


def test_mean_loss_does_not_depend_on_the_batches(recipe: MakeRecipe) -> None:
    from lorakit.train import load_examples, render
    from lorakit.train.collate import PackedCollator, PaddedCollator
    from lorakit.train.recipe import TrainSection

    made = recipe(max_steps=1)
    result = train(made)
    rows = render(load_examples(made.data, "train"), result.tokenizer, max_length=500).rows
    values = [
        mean_loss(result.model, rows, collator, TrainSection(batch_rows=n))
        for collator in (PackedCollator(), PaddedCollator(2))
        for n in (1, 5, 24)
    ]
    assert values == pytest.approx([values[0]] * 6, rel=1e-5)


def test_the_first_step_is_adamw_on_the_gradient_of_the_mean_loss(recipe: MakeRecipe) -> None:
    """``p - lr g / (|g| + eps)``, with ``g`` of the mean over all learnt tokens."""
    from lorakit.models import load_model
    from lorakit.train import load_examples, render
    from lorakit.train.collate import PaddedCollator
    from lorakit.train.loss import summed_loss

    made = recipe(max_steps=1, lr=1e-3, warmup=0, schedule="constant", max_grad_norm=0, batch_rows=24)
    result = train(made)
    model = load_model(made.model.name)
    lk.attach(model, made.adapter.adapter(), seed=0)
    rows = render(load_examples(made.data, "train", learning=True), result.tokenizer, max_length=500)
    (summed_loss(model, model, PaddedCollator(2)(rows.rows)) / rows.learnt).backward()
    for name, after in lk.trainable(result.model).items():
        before = lk.trainable(model)[name]
        gradient = before.grad
        assert gradient is not None
        expected = before - 1e-3 * gradient / (gradient.abs() + 1e-8)
        assert (after - expected).abs().median() < 1e-6, name


def test_weight_decay_is_for_matrices_only(recipe: MakeRecipe) -> None:
    from lorakit.models import load_model

    settings: dict[str, Any] = {"max_steps": 1, "warmup": 0, "schedule": "constant", "lr": 1e-2}
    adapter = {"groups": {"q_proj": {"r": 2}, "norm": {"method": "full"}}}
    plain = tensors(train(recipe("a", sections={"adapter": adapter}, **settings)).adapter)
    decayed = tensors(train(recipe("b", sections={"adapter": adapter}, weight_decay=0.5, **settings)).adapter)
    model = load_model(recipe().model.name)
    lk.attach(model, recipe(sections={"adapter": adapter}).adapter.adapter(), seed=0)
    start = lk.extract(model)
    A = "model.layers.0.self_attn.q_proj.lora_A"
    before = start.tensors["model.layers.0.self_attn.q_proj"]["lora_A"]
    assert torch.allclose(plain[A] - decayed[A], 1e-2 * 0.5 * before, atol=1e-6)
    norms = [name for name in plain if "norm" in name]
    assert norms
    for name in norms:
        assert torch.equal(plain[name], decayed[name]), name


def test_garbage_is_looked_for_seldom_until_the_first_step(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lorakit.train.render import Renderer

    usual, seen = gc.get_threshold(), {}

    class Watching(Silent):
        def step(self, report: StepReport) -> None:
            seen["step"] = gc.get_threshold()

    def rows(self: Renderer, examples: Any) -> Any:
        seen["rows"] = gc.get_threshold()
        return original(self, examples)

    original = Renderer.rows
    monkeypatch.setattr(Renderer, "rows", rows)
    train(recipe(max_steps=1), progress=Watching())
    assert seen["rows"][0] > 100 * usual[0]
    assert seen["step"] == gc.get_threshold() == usual
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        train(recipe("other", max_steps=1))
    assert gc.get_threshold() == usual


def test_what_an_earlier_run_left_in_a_cycle_is_gone_before_the_next(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    class Model:
        itself: Model

    model = Model()
    model.itself = model
    left = weakref.ref(model)
    asked = recipe(max_steps=1)
    (tmp_path / "train.jsonl").write_text("{}\n")
    gc.disable()
    try:
        del model
        with pytest.raises(DataError):
            train(asked)
        assert left() is None
    finally:
        gc.enable()
