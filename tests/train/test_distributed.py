"""Two processes learn what one learns, write what one writes, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.train import Recipe, Silent, TrainResult, read_metrics, train
from lorakit.train.batches import shared_out
from lorakit.train.distributed import join
from lorakit.train.run_files import checkpoints
from tests.tiny_chat import colour_rows, write_rows
from tests.tiny_encoder import save_tiny_encoder
from tests.train.test_trainer import StopAt, assert_equal, tensors

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the two processes")

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PAIRS = [
    {"prompt": f"{i}{'?' * (i % 3)}", "chosen": "red" + "!" * (i % 4), "rejected": "blue" * (1 + i % 2)}
    for i in range(11)
]
TEXTS = [{"text": f"{i} red", "second_text": f"{i} blue"} for i in range(8)]

# What is trained, beside the tiny model on 21 rows with r=4 and 6 steps of 4 rows.
RUNS: dict[str, dict[str, Any]] = {
    "packed": {"train": {"max_steps": None, "epochs": 2, "eval_every": 5, "save_every": 4}},  # ends: 1 row
    "accumulated": {
        "train": {
            "max_steps": None, "epochs": 2, "batching": "padded", "accumulation": 3, "batch_rows": 2,
            "weight_decay": 0.1, "max_grad_norm": 0.5, "lora_plus_ratio": 4,
        }
    },
    "row_by_row": {"train": {"batch_rows": 1}},
    "adalora": {
        "adapter": {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}
    },
    "dora": {"adapter": {"method": "dora", "r": 4}},
    "vera": {"adapter": {"method": "vera", "r": 8}},
    "head": {
        "adapter": {"r": 4, "targets": ["q_proj", "lm_head", "embed_tokens"]},
        "train": {"activation_checkpointing": True},
    },
    "several": {"adapters": True},
    "dpo": {"task": "dpo"},
    "quantized": {"quantize": "nf4"},
}  # fmt: skip
SHARDED = ("packed", "adalora", "dora", "vera", "head", "several")
DROPOUT = {"adapter": {"r": 4, "dropout": 0.3}, "train": {"max_steps": 7, "save_every": 2}}


class Plans:
    """Recipes, as JSON holds them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, str(model)
        self.encoder = str(save_tiny_encoder(folder / "encoder"))
        self.files = {
            name: str(write_rows(folder / f"{name}.jsonl", rows))
            for name, rows in {
                "colours": colour_rows(21), "valid": colour_rows(30)[24:], "few": colour_rows(7),
                "pairs": PAIRS, "texts": TEXTS,
            }.items()
        }  # fmt: skip

    def __call__(self, output: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        file, task = self.files["colours"], changes.get("task")
        data = {"train": file, "valid": self.files["valid"]}
        if task:
            data = {"train": self.files["pairs" if task == "dpo" else "texts"]}
        plan = {
            "model": self.encoder if task == "embedding" else self.model,
            "adapter": {"r": 4, "alpha": 8},
            "data": data,
            "output": str(self.folder / output),
            **changes,
            "quantize": None,
            "train": {
                "max_steps": 6, "batch_rows": 4, "lr": 1e-2, "log_every": 1, **changes.get("train", {})
            },
        }  # fmt: skip
        if "quantize" in changes:
            plan["model"] = {"name": self.model, "quantize": changes["quantize"]}
        if plan.pop("adapters", False):
            del plan["adapter"], plan["data"]
            plan["adapters"] = [
                {"name": "one", "r": 4, "data": {"train": file}},
                {"name": "two", "r": 2, "lr": 5e-3, "data": {"train": self.files["few"]}},
            ]
        return {key: value for key, value in plan.items() if value is not None}


class Pairs:
    """What the pairs of processes left."""

    def __init__(self, folder: Path, plans: Plans) -> None:
        self.folder, self.plans = folder, plans
        self.ended = json.loads((folder / "ended.json").read_text(encoding="utf-8"))

    def of(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The records of both processes."""
        first, second = (
            json.loads((self.folder / f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in range(2)
        )
        return first, second


def run_pairs(folder: Path, plans: Plans, jobs: list[dict[str, Any]]) -> Pairs:
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    words = [sys.executable, "-m", "tests.train.two_processes", str(folder / "jobs.json")]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return Pairs(folder, plans)


@needs_fork
def test_the_shortest_pair(tmp_path: Path, tiny_folder: Path) -> None:
    """What the slow tests below prove for many runs, for one of three steps, the last of them with a single row."""
    plans = Plans(tmp_path, tiny_folder)
    short: dict[str, Any] = {"data": {"train": str(write_rows(tmp_path / "nine.jsonl", colour_rows(9)))}}
    short["train"] = {"max_steps": 3}
    one = train(Recipe.from_mapping(plans("one", short)))
    jobs = [
        {"name": "plain", "recipe": plans("plain", short)},
        {"name": "sharded", "recipe": plans("sharded", short), "environment": FSDP},
    ]
    pairs = run_pairs(tmp_path, plans, jobs)
    for name in ("plain", "sharded"):
        main, other = pairs.of(name)
        assert_learnt_the_same(main, tmp_path / name, one)
        assert other["written"] == []


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Pairs:
    """Run all jobs in one program: importing takes longer than training."""
    folder = tmp_path_factory.mktemp("pairs")
    plans = Plans(folder, tiny_folder)
    jobs: list[dict[str, Any]] = []

    def add(name: str, changes: Mapping[str, Any], output: str | None = None, **more: Any) -> None:
        jobs.append({"name": name, "recipe": plans(output or name, changes), **more})

    for name, changes in RUNS.items():
        add(name, changes)
    for name in SHARDED:
        add(f"{name}-sharded", RUNS[name], environment=FSDP)
    add("stopped", RUNS["packed"], stop=5)
    train(Recipe.from_mapping(plans("begun", RUNS["packed"])), progress=StopAt(3))
    add("begun", RUNS["packed"], resume=True, environment=FSDP)
    add("whole", DROPOUT)
    for rank, step in ((0, 3), (1, 5)):
        add(f"killed-{rank}", DROPOUT, killed_rank=rank, killed_at=step)
        add(f"revived-{rank}", DROPOUT, output=f"killed-{rank}", resume=True)
    add("infinite", {"train": {"lr": 1e30, "max_grad_norm": 0, "warmup": 0}})
    add("joint", {"task": "embedding", "train": {"accumulation": 3}})
    add("quantized-sharded", RUNS["quantized"], environment=FSDP)
    kept = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    add("kept", RUNS["packed"], environment={**FSDP, **kept})
    odd = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}
    add("odd", RUNS["packed"], environment={**FSDP, **odd})
    return run_pairs(folder, plans, jobs)


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def one_process(pairs: Pairs, name: str) -> TrainResult:
    return train(Recipe.from_mapping(pairs.plans(f"one-{name}", RUNS[name])), overwrite=True)


def assert_learnt_the_same(record: Mapping[str, Any], output: Path, one: TrainResult) -> None:
    assert record.get("losses"), record
    assert record["losses"] == pytest.approx(one.losses, rel=1e-5)
    for name, losses in one.losses_of.items():
        assert record["losses_of"][name] == pytest.approx(losses, rel=1e-5)
    assert record["tokens"] == [one.tokens, one.learnt_tokens]
    if one.valid_loss is not None:
        assert record["valid_loss"] == pytest.approx(one.valid_loss, rel=1e-5)
    for folder in one.adapters.values():
        ours, theirs = tensors(output / folder.relative_to(one.folder)), tensors(folder)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=3e-5, msg=name)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(pairs: Pairs, name: str) -> None:
    one = one_process(pairs, name)
    for kind in [name, *([f"{name}-sharded"] if name in SHARDED else [])]:
        main, other = pairs.of(kind)
        assert_learnt_the_same(main, pairs.folder / kind, one)
        assert other["losses"] == main["losses"]


@needs_fork
@pytest.mark.slow
def test_only_the_main_process_writes_and_tells(pairs: Pairs) -> None:
    for kind in ("packed", "packed-sharded"):
        main, other = pairs.of(kind)
        assert other["written"] == []  # its random state, which only it knows, is written by torch
        assert "metrics.jsonl" in main["written"]
        assert all(
            (checkpoint / "rng_state_1.pth").is_file() for checkpoint in checkpoints(pairs.folder / kind)
        )
        assert other["steps"] == other["lines"] == []
        assert main["steps"] == list(range(1, 13))
        lines = read_metrics(pairs.folder / kind / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == main["steps"]
        run = json.loads((pairs.folder / kind / "run.json").read_text(encoding="utf-8"))
        assert run["processes"] == 2
        assert run["ended"]["how"] == "finished"


@needs_fork
@pytest.mark.slow
def test_the_base_is_cut_up_and_the_adapter_is_not(pairs: Pairs) -> None:
    for name in SHARDED:
        records = pairs.of(f"{name}-sharded")
        assert sum(record["base_parts"] for record in records) == 35_168
        for record in records:
            assert record["base_whole"] == 35_168
            assert record["base_parts"] == pytest.approx(35_168 / 2, rel=0.01)  # 259 rows of embeddings
            assert record["trained_parts"] == 0
    for record in pairs.of("packed"):
        assert record["base_whole"] == 0


@needs_fork
@pytest.mark.slow
def test_resuming_in_another_number_of_processes(pairs: Pairs) -> None:
    one = one_process(pairs, "packed")
    main, other = pairs.of("stopped")
    assert main["stopped_by"] == other["stopped_by"] == "interrupt"
    assert checkpoints(pairs.folder / "stopped")[-1].name == "checkpoint-5"
    told = Told()
    alone = train(Recipe.from_mapping(pairs.plans("stopped", RUNS["packed"])), resume=True, progress=told)
    assert list(alone.losses) == pytest.approx(one.losses, rel=1e-5)
    assert any("processes were 2, are 1" in line for line in told.lines)
    for name, tensor in tensors(one.adapter).items():
        torch.testing.assert_close(tensors(alone.adapter)[name], tensor, rtol=1e-3, atol=3e-5)
    assert_learnt_the_same(pairs.of("begun")[0], pairs.folder / "begun", one)
    assert_learnt_the_same(pairs.of("kept")[0], pairs.folder / "kept", one)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_and_resumed_is_never_killed(pairs: Pairs, rank: int) -> None:
    """With dropout: the random states of both processes are restored too."""
    assert pairs.ended[f"killed-{rank}"][rank] == signal.SIGKILL
    assert pairs.ended["whole"] == pairs.ended[f"revived-{rank}"] == [0, 0]
    whole, killed = pairs.folder / "whole", pairs.folder / f"killed-{rank}"
    assert pairs.of(f"revived-{rank}")[0]["losses"] == pairs.of("whole")[0]["losses"]
    assert_equal(killed / "adapter", whole / "adapter")
    lines = [read_metrics(run / "metrics.jsonl") for run in (whole, killed)]
    one, other = ([line["loss"] for line in found if "loss" in line] for found in lines)
    assert one == other
    assert len(one) == 7


@needs_fork
@pytest.mark.slow
def test_processes_drop_different_numbers(pairs: Pairs) -> None:
    """Dropout is drawn for each process by itself, so the losses are not those of one process."""
    one = train(Recipe.from_mapping(pairs.plans("dropout", DROPOUT)))
    losses = pairs.of("whole")[0]["losses"]
    assert losses[0] == pytest.approx(one.losses[0], rel=1e-5)  # B is zero
    assert losses[1:] != pytest.approx(one.losses[1:], rel=1e-5)


@needs_fork
@pytest.mark.slow
def test_all_processes_stop_at_a_loss_that_is_not_finite(pairs: Pairs) -> None:
    for record in pairs.of("infinite"):
        assert record["error"] == "TrainingError"
        assert "Lower train.lr" in record["message"]
    named = json.loads((pairs.folder / "infinite" / "bad_batch.json").read_text(encoding="utf-8"))
    assert [len(batch) for batch in named["batches"]] == [4]


@needs_fork
@pytest.mark.slow
def test_what_is_refused(pairs: Pairs) -> None:
    for record in pairs.of("joint"):
        assert record["error"] == "ConfigError"
        assert "set train.accumulation to a multiple of 2" in record["message"]
    for record in pairs.of("quantized-sharded"):
        assert record["error"] == "ConfigError"
        assert "cannot cut up a quantised base" in record["message"]
    for record in pairs.of("odd"):
        assert record["error"] == "ConfigError"
        assert "has no layers called BertLayer" in record["message"]
    assert not (pairs.folder / "quantized-sharded").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "does not train under DeepSpeed"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
            },
            "fsdp_offload_params: false",
        ),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started several processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "fsdp_version: 2",
        ),
    ],
)
def test_launchers_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("LORAKIT_USE_FSDP", "false")
    for name, value in {"ACCELERATE_USE_FSDP": "false", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        join()


def test_alone() -> None:
    world = join()
    assert world.is_main
    assert not world.shards
    assert world.total([1.5]) == world.most([1.5]) == [1.5]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_each_step_has_the_rows_of_one_process(processes: int, accumulation: int, whole: bool) -> None:
    batches = [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9], [10, 11], [12, 13], [14]]
    lengths = [5 + (7 * row) % 11 for row in range(15)]
    rounds = shared_out(batches, lengths, accumulation=accumulation, processes=processes, whole=whole)
    each = -(-accumulation // processes)  # rounds of a step
    for step, first in enumerate(range(0, len(batches), accumulation)):
        planned = batches[first : first + accumulation]
        found = [share for shares in rounds[step * each : (step + 1) * each] for share in shares]
        rows = sorted(row for share in found for row in share)
        assert rows == sorted(row for batch in planned for row in batch)
        assert all(len(shares) == processes for shares in rounds)
        if whole:
            assert all(share in planned for share in found if share)
    assert len(rounds) <= each * -(-len(batches) // accumulation)
    if processes == 1:
        assert [share for (share,) in rounds] == batches


def test_rows_are_dealt_out_by_tokens() -> None:
    ((one, two),) = shared_out([[0, 1, 2, 3]], [9, 1, 5, 4], accumulation=1, processes=2)
    assert (one, two) == ([0, 1], [2, 3])


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "fsdp2_cpu", "data_parallel_cpu"])
def test_the_launchers(tmp_path: Path, tiny_folder: Path, launcher: str) -> None:
    """The commands of the guide, with the files of recipes/accelerate."""
    plan = Plans(tmp_path, tiny_folder)("run", {})
    (tmp_path / "recipe.yaml").write_text(json.dumps(plan), encoding="utf-8")  # JSON is YAML
    root = Path(__file__).parents[2]
    start = {"torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}.get(
        launcher,
        [
            "accelerate.commands.launch",
            "--config_file", str(root / "recipes" / "accelerate" / f"{launcher}.yaml"),
            "--main_process_port", "0",
        ],
    )  # fmt: skip
    words = [sys.executable, "-m", *start, "-m", "lorakit", "train", str(tmp_path / "recipe.yaml")]
    path = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained") + done.stderr.count("Trained") == 1
    assert ("FSDP 2: 2 layers" in done.stderr) == (launcher == "fsdp2_cpu")
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["processes"] == 2
    assert lk.read(tmp_path / "run" / "adapter").spec.methods
