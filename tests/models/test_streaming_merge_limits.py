"""What merging into a checkpoint needs of memory, what a kill leaves, and a real model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.io.checkpoint import Checkpoint
from lorakit.models import load_model, merge_source, new_folder, streaming_merge
from lorakit.models.streaming_merge import merge_checkpoint

CHILD = """
import resource, sys
from pathlib import Path
import torch
from lorakit.io.checkpoint import Checkpoint
from lorakit.models.streaming_merge import merge_checkpoint

warm, base, adapter, largest, out = (*map(Path, sys.argv[1:4]), int(sys.argv[4]), Path(sys.argv[5]))
merge_checkpoint(warm / "base", [warm / "adapter"], out / "warm")  # whatever is imported is there now


def kilobytes(word):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(word + ":"))


before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
limit = 1024 * kilobytes("VmData") + 2 * largest
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
merge_checkpoint(base, [adapter], out / "big")
print(1024 * (kilobytes("VmHWM") - before))
try:
    all_of_it = dict(Checkpoint(base))
except (RuntimeError, MemoryError):
    print("the whole model does not fit")
"""


def saved(folder: Path, dtype: torch.dtype, width: int, tokens: int) -> int:
    """A base and an adapter of it; the bytes of the largest tensor."""
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base")
    inner = {"q_proj": lk.LoRA(r=4), "embed_tokens": lk.DoRA(lk.LoRA(r=4)), "lm_head": lk.DoRA(lk.LoRA(r=4))}
    lk.attach(model, inner, seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(0.01)
    lk.save(model, folder / "adapter")
    return tokens * width * dtype.itemsize


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits data memory")
@pytest.mark.parametrize(
    ("dtype", "width", "tokens"),
    [
        pytest.param(torch.float32, 256, 2**16, id="f32"),
        pytest.param(torch.bfloat16, 256, 2**17, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_below_twice_the_largest_tensor(
    tmp_path: Path, dtype: torch.dtype, width: int, tokens: int
) -> None:
    (tmp_path / "warm").mkdir()
    (tmp_path / "big").mkdir()
    saved(tmp_path / "warm", dtype, 32, 64)
    largest = saved(tmp_path / "big", dtype, width, tokens)
    assert largest == 64 * 2**20
    places = [
        tmp_path / "warm",
        tmp_path / "big" / "base",
        tmp_path / "big" / "adapter",
        largest,
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, places)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    peak, verdict = done.stdout.split("\n", 1)
    assert largest < int(peak) < 2 * largest
    assert verdict.strip() == "the whole model does not fit"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "big", dtype=dtype)


def _dying(chunks: Any, after: int) -> Iterator[Any]:
    for n, chunk in enumerate(chunks):
        if n == after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk


def _merge_and_die(base: Path, adapter: Path, out: Path, step: str) -> None:
    disk: Any = streaming_merge.DISK
    write, calls = disk.write, []

    def dying_write(path: Path, chunks: Any) -> None:
        calls.append(path)
        number, _, after = step.partition(" ")
        write(path, _dying(chunks, int(after)) if str(len(calls)) == number else chunks)

    def dying_replace(out: Path, part: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    disk.write = dying_write
    if step == "rename":
        new_folder._replace = dying_replace  # type: ignore[assignment]
    if step == "settings":
        merge_source.MergeSource.write_settings = dying_replace  # type: ignore[assignment, method-assign]
    merge_checkpoint(base, [adapter], out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("step", ["settings", "1 0", "1 1", "2 1", "3 0", "rename"])
def test_a_kill_leaves_no_half_model(tmp_path: Path, step: str) -> None:
    torch.manual_seed(0)
    saved(tmp_path, torch.float32, 32, 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    lk.load(model, tmp_path / "adapter")
    lk.merge(model, permanent=True)
    args = (tmp_path / "sharded", tmp_path / "adapter", tmp_path / "out", step)
    child = multiprocessing.get_context("fork").Process(target=_merge_and_die, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out*"))) == 1
    merge_checkpoint(tmp_path / "sharded", [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "sharded"]
    found = Checkpoint(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_smollm2_gives_the_bits_of_a_merge_in_memory(tmp_path: Path) -> None:
    """The built-in model, and its GGUF file's dtype: float32; and the same rounded to bfloat16."""
    model = load_model("smollm2", dtype="bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    lk.attach(model, {"all-linear": lk.LoRA(r=8), "embed_tokens": lk.LoRA(r=4)}, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    lk.save(model, tmp_path / "adapter")
    for base, dtype in ((tmp_path / "bf16", torch.bfloat16), ("smollm2", torch.float32)):
        model = load_model(base, dtype=dtype)
        lk.load(model, tmp_path / "adapter")
        lk.merge(model, permanent=True)
        out = tmp_path / f"out-{dtype}"
        result = merge_checkpoint(base, [tmp_path / "adapter"], out)
        again = load_model(out, dtype=dtype).state_dict()
        assert again.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(again[name], value), name
        assert result.untied
        assert result.error < (0.2 if dtype is torch.bfloat16 else 1e-4)
