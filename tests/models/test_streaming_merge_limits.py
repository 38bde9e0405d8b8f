"""What merging into a checkpoint needs of memory, what a kill leaves, and a real model."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import lorakit as lk
from lorakit.core import Method
from lorakit.io.checkpoint import Checkpoint
from lorakit.models import load_model, merge_source, new_folder, streaming_merge
from lorakit.models.streaming_merge import merge_checkpoint

CHILD = """
import resource, sys
from pathlib import Path
import torch
from lorakit.io.checkpoint import Checkpoint
from lorakit.models.streaming_merge import merge_checkpoint

warm, big, out, largest, task = *map(Path, sys.argv[1:4]), int(sys.argv[4]), sys.argv[5]


def merge(folder, case):
    adapters = sorted((folder / case).glob("adapter*"))
    merge_checkpoint(folder / "base", adapters, out / folder.name / case, task=task)


cases = sorted(path.name for path in big.iterdir() if path.name != "base")
for case in cases:
    merge(warm, case)  # whatever is imported is there now


def kilobytes(word):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(word + ":"))


limit = 1024 * kilobytes("VmData") + 2 * largest
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for case in cases:
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    merge(big, case)
    print(case, 1024 * (kilobytes("VmHWM") - before))
try:
    all_of_it = dict(Checkpoint(big / "base"))
except (RuntimeError, MemoryError):
    print("the whole model does not fit")
"""


COMMON = {"q_proj": lk.LoRA(r=4), "embed_tokens": lk.DoRA(lk.LoRA(r=4)), "lm_head": lk.DoRA(lk.LoRA(r=4))}
HEAD: dict[str, list[dict[str, Method]]] = {
    "dora_lokr": [{"lm_head": lk.DoRA(lk.LoKr(r=4))}],
    "dora_input": [{"lm_head": lk.InputDoRA(lk.LoRA(r=4))}],
    "token_rows": [{"lm_head": lk.TokenRows((3, 5))}, {"embed_tokens": lk.TokenRows((3, 5))}],
    "interleaved": [{"lm_head[0:10,20:30,40:50]": lk.LoRA(r=2), "lm_head[10:20,30:35]": lk.LoKr(r=2)}],
    "overlapping": [
        {"lm_head[0:40]": lk.LoRA(r=2)},
        {"lm_head[20:60]": lk.LoKr(r=2)},
        {"lm_head": lk.LoHa(r=2)},
    ],
}


def saved(
    folder: Path,
    dtype: torch.dtype,
    width: int,
    tokens: int,
    cases: Mapping[str, Sequence[dict[str, Method]]] = MappingProxyType({"common": [COMMON]}),
) -> int:
    """A base and adapters of it; the bytes of the largest tensor."""
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return _saved(folder, LlamaForCausalLM(config).to(dtype), cases)


def saved_convolutions(folder: Path, channels: int) -> int:
    """The same of convolutions."""
    sizes = {"embedding_size": 4, "hidden_sizes": [channels], "depths": [2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2))
    adapters = [{"all-conv": lk.LoRAC(r=1)}, {"layer.1.convolution": lk.LoKr(r=2)}]
    return _saved(folder, model, {"both": adapters})


def _saved(folder: Path, model: Any, cases: Mapping[str, Sequence[dict[str, Method]]]) -> int:
    model.save_pretrained(folder / "base")
    for case, adapters in cases.items():
        for n, adapter in enumerate(adapters):
            lk.attach(model, adapter, seed=n)
            with torch.no_grad():
                for parameter in lk.trainable(model).values():
                    parameter.add_(0.01)
            lk.save(model, folder / case / f"adapter{n or ''}")
            lk.detach(model)
    return max(p.numel() * p.element_size() for p in model.parameters())


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
    saved(tmp_path / "warm", dtype, 32, 64)
    largest = saved(tmp_path / "big", dtype, width, tokens)
    assert largest == 64 * 2**20
    assert_below_twice(tmp_path, largest)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "big" / "common", dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits data memory")
def test_the_peak_of_what_has_no_plain_rows(tmp_path: Path) -> None:
    """Kronecker products, norms over all rows, tokens of a head, slices that interleave or overlap."""
    saved(tmp_path / "warm", torch.float32, 32, 64, HEAD)
    scaled = {
        case: [{_larger(name, 2**9): method for name, method in adapter.items()} for adapter in adapters]
        for case, adapters in HEAD.items()
    }
    largest = saved(tmp_path / "big", torch.float32, 512, 2**15, scaled)
    assert_below_twice(tmp_path, largest)


def _larger(name: str, times: int) -> str:
    """A slice with its rows multiplied."""
    return re.sub(r"\d+(?=[:,\]])", lambda number: str(times * int(number[0])), name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits data memory")
def test_the_peak_of_convolutions(tmp_path: Path) -> None:
    saved_convolutions(tmp_path / "warm", 8)
    assert_below_twice(tmp_path, saved_convolutions(tmp_path / "big", 1336), "image-classification")


def assert_below_twice(folder: Path, largest: int, task: str = "causal-lm") -> None:
    places = [folder / "warm", folder / "big", folder / "out"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, places), str(largest), task],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *peaks, verdict = done.stdout.splitlines()
    for line in peaks:
        # The merge before may have left some memory to the process, which this one used again.
        assert 0.9 * largest < int(line.rpartition(" ")[2]) < 2 * largest, line
    assert verdict == "the whole model does not fit"


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
        new_folder.put_in_place = dying_replace  # type: ignore[assignment]
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
    lk.load(model, tmp_path / "common" / "adapter")
    lk.merge(model, permanent=True)
    args = (tmp_path / "sharded", tmp_path / "common" / "adapter", tmp_path / "out", step)
    child = multiprocessing.get_context("fork").Process(target=_merge_and_die, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out*"))) == 1
    merge_checkpoint(tmp_path / "sharded", [tmp_path / "common" / "adapter"], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "common", "out", "sharded"]
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
