"""Is the memory that `lorakit plan` foretells the memory that training and inference take?

Each case runs in a fresh process on the CPU: the model is made with random weights, a tiny model is trained first (so
that libraries have loaded their code), and then the peak of the resident memory above that of the loaded model is read
from the kernel. The plan is made from the same config in this process, on the meta device.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from benchmarks.harness import Aim, Benchmark, main_or_child, start
from lorakit.core import Method, method_from_json
from lorakit.plan import Run, architecture, plan

STORIES = {  # the sizes of stories260K, with more positions
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
NARROW = {**STORIES, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
CONFIGS: Mapping[str, Mapping[str, Any]] = {"stories260k": STORIES, "llama-256": NARROW}

LORA: dict[str, Any] = {"method": "lora", "r": 8}
# Model, method, training or inference, and how.
CASES: tuple[tuple[str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("smollm2", LORA, "training", {"batch": 2, "length": 128}),
    ("smollm2", LORA, "training", {"batch": 1, "length": 512}),
    ("smollm2", {**LORA, "r": 64, "dropout": 0.1}, "training", {"batch": 4, "length": 64}),
    ("smollm2", LORA, "training", {"batch": 4, "length": 128, "checkpointing": True}),
    ("smollm2", LORA, "training", {"batch": 4, "length": 64, "packing": True, "learnt": 0.25}),
    ("smollm2", LORA, "training", {"batch": 2, "length": 128, "storage": "nf4"}),
    ("smollm2", {"method": "dora", "inner": LORA}, "training", {"batch": 2, "length": 128}),
    ("smollm2", {"method": "vera"}, "training", {"batch": 2, "length": 128}),
    ("smollm2", {"method": "lokr"}, "training", {"batch": 2, "length": 128}),
    ("smollm2", {"method": "prefix"}, "training", {"batch": 2, "length": 128}),
    ("smollm2", LORA, "inference", {"batch": 4, "length": 512}),
    ("smollm2", LORA, "inference", {"batch": 2, "length": 256, "adapters": 16}),
    ("gpt2", LORA, "training", {"batch": 2, "length": 128}),
    ("gpt2", {"method": "houlsby"}, "training", {"batch": 1, "length": 256}),
    ("minilm", LORA, "training", {"batch": 16, "length": 128}),
    ("minilm", {"method": "bitfit"}, "training", {"batch": 32, "length": 64}),
    ("t5-base", {"method": "ia3"}, "training", {"batch": 2, "length": 128}),
    ("vit-b-16", LORA, "training", {"batch": 2}),
    ("stories260k", LORA, "training", {"batch": 32, "length": 256}),
    ("stories260k", {"method": "loha"}, "training", {"batch": 16, "length": 512}),
    ("llama-256", LORA, "training", {"batch": 8, "length": 256}),
    ("llama-256", LORA, "inference", {"batch": 16, "length": 512}),
)


def run_of(settings: Mapping[str, Any]) -> Run:
    return Run(device="cpu", **{"length": 1, **settings})


def foretold(config: str, method: Method, kind: str, run: Run) -> int:
    made = plan(config, method, run=run)
    memory = made.training if kind == "training" else made.inference
    assert memory is not None
    return memory.above_weights


def real_model(config: str) -> torch.nn.Module:
    """With random weights."""
    shell = architecture(config).model
    return type(shell)._from_config(shell.config)


def train(model: torch.nn.Module, run: Run, steps: int) -> None:
    """Steps as `lorakit train` makes them, on random tokens."""
    from contextlib import nullcontext

    from lorakit.train.activation_checkpointing import checkpoint_activations
    from lorakit.train.packing import pack, packed

    optimizer = torch.optim.AdamW(lk.trainable(model).values(), fused=True)
    model.train()
    if run.checkpointing:
        checkpoint_activations(model, True)
    for _ in range(steps):
        if run.packing:
            inputs = pack([[1] * run.length] * run.batch)
        else:
            inputs = inputs_of(model, run)
        tokens = run.batch * run.length if run.packing else run.length
        if takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = torch.arange(max(1, round(tokens * run.learnt)))
        with packed(model) if run.packing else nullcontext():
            out = model(**inputs)
            logits = getattr(out, "logits", None)
            if logits is None:
                loss = out.last_hidden_state.float().sum()
            else:
                labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
                flat = logits.reshape(-1, logits.shape[-1]).float()
                loss = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum")
                del flat, logits
            del out
            loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()


def takes(model: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def inputs_of(model: torch.nn.Module, run: Run) -> dict[str, Any]:
    if getattr(model, "main_input_name", "") == "pixel_values":
        side = model.config.image_size
        return {"pixel_values": torch.zeros(run.batch, 3, side, side)}
    ids = torch.ones(run.batch, run.length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def infer(model: torch.nn.Module, run: Run) -> None:
    model.eval()
    with torch.no_grad():
        model(**{**inputs_of(model, run), "use_cache": True, "logits_to_keep": 1})


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) * 1024


def child(case: Mapping[str, Any]) -> None:
    """Print the bytes that the case takes above the loaded model."""
    import ctypes
    import gc

    torch.set_num_threads(int(case["threads"]))
    method, run = method_from_json(case["method"]), run_of(case["run"])
    small = architecture(case["warm"]).model
    small = type(small)._from_config(small.config)
    lk.attach(small, lk.LoRA(r=4))
    train(small, Run(device="cpu", batch=4, length=64, checkpointing=run.checkpointing), 2)
    del small
    model = real_model(case["config"])
    if run.storage == "nf4":
        lk.quantize(model)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    for i in range(run.adapters if case["kind"] == "inference" else 1):
        lk.attach(model, method, name=f"adapter{i}")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    if case["kind"] == "training":
        train(model, run, 3)
    else:
        infer(model, run)
    print(resident("VmHWM") - before)


def measured(case: Mapping[str, Any]) -> int:
    # What torch frees goes back to the system at once, so that what is resident is what is alive.
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(case["threads"]),
        "LORAKIT_KERNELS": "off",
    }
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--child", json.dumps(case)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def name_of(case: tuple[str, dict[str, Any], str, dict[str, Any]]) -> str:
    model, method, kind, settings = case
    how = " ".join(f"{key} {value}" for key, value in settings.items() if value is not True)
    flags = "".join(f", {key}" for key, value in settings.items() if value is True)
    return f"{model}, {method['method']}, {kind}: {how}{flags}"


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("plan_memory", __doc__ or "", argv)
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in CONFIGS.items():
            Path(scratch, f"{name}.json").write_text(json.dumps(config))
        cases = CASES[:1] + CASES[-4:-3] if bench.quick else CASES
        for case in cases:
            model, method, kind, settings = case
            config = str(Path(scratch, f"{model}.json")) if model in CONFIGS else model
            said = foretold(config, method_from_json(method), kind, run_of(settings))
            told = {
                "config": config, "method": method, "kind": kind, "run": settings, "threads": bench.threads,
                "warm": str(Path(scratch, "stories260k.json")),
            }  # fmt: skip
            taken = measured(told)
            bench.add(
                name_of(case),
                {"planned": [said / 1e6], "measured": [taken / 1e6]},
                unit="MB",
                ratio=("planned", "measured"),
                note="Above the loaded model. A plan within 10 % has a ratio between 0.9 and 1.1.",
                aim=Aim("ratio", ">=", 0.9) if said < taken else Aim("ratio", "<=", 1.1),
            )
    bench.finish()
    return bench


if __name__ == "__main__":
    main_or_child(main, child)
