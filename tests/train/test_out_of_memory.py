"""When memory runs out, the message says what is largest and what to change."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.errors import LorakitError, OutOfMemoryError, TrainingError
from lorakit.train import Recipe, train
from lorakit.train.loop import AdapterTrainer
from lorakit.train.out_of_memory import explain, explained, is_out_of_memory
from tests.tiny_chat import write_rows

MakeRecipe = Callable[..., Recipe]


def test_what_counts_as_running_out() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="other"), explained(lambda: None):
        raise ValueError("other")


def test_a_planner_that_fails_does_not_hide_it() -> None:
    def broken() -> None:
        raise RuntimeError("no plan")

    with pytest.raises(OutOfMemoryError, match=r"Memory ran out.*train\.batch_rows"), explained(broken):
        raise MemoryError
    assert issubclass(OutOfMemoryError, (TrainingError, MemoryError, LorakitError))
    assert "MemoryError" in explain(MemoryError(), None)


def test_the_largest_term_is_named(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: AdapterTrainer, *args: object, **given: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(AdapterTrainer, "compute_loss", full)
    made = recipe()
    with pytest.raises(OutOfMemoryError) as caught:
        train(made)
    message = str(caught.value)
    assert "activations" in message.split("the largest")[0]
    assert "batch of 4 rows" in message
    assert "\n  - train." in message or "\n  - model." in message
    run = json.loads((made.output / "run.json").read_text(encoding="utf-8"))
    assert run["ended"]["error"].startswith("OutOfMemoryError")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_machine_that_is_really_full(recipe: MakeRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "x" * 400, "completion": "y" * 400}] * 600)
    made = recipe(batch_rows=600, max_steps=1, batching="padded", max_length=1000)
    (tmp_path / "plan.json").write_text(json.dumps(made.plain()), encoding="utf-8")
    script = """
        import json, re, resource, sys
        from lorakit.train import Recipe, train
        import lorakit.train.loop
        recipe = Recipe.from_mapping(json.load(open(sys.argv[1])))
        now = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + 10**9, now + 10**9))
        train(recipe)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "OutOfMemoryError: Memory ran out" in done.stderr
    assert "batch of 600 rows" in done.stderr
    assert "train.activation_checkpointing" in done.stderr or "train.batch_rows" in done.stderr
