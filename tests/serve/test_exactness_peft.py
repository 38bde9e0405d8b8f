"""Adapters that PEFT made and saved, served all at once: PEFT's own answers, token for token."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.io.adapter_directory import read as read_adapter
from lorakit.models.load import load_model, load_tokenizer
from lorakit.serve.engine import Engine
from lorakit.serve.scheduler import EngineLimits
from lorakit.serve.transformers_runner import TransformersRunner
from lorakit.serve.versions import AdapterVersion, make_version
from tests.serve.tiny_serving import EOS, byte_tokenizer, ids, read, request, tiny_decoder

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def configs() -> dict[str, Any]:
    return {
        "rank 8": peft.LoraConfig(r=8, target_modules=ATTENTION),
        "rank 32": peft.LoraConfig(r=32, lora_alpha=8, target_modules=EVERYTHING),
        "rank 3": peft.LoraConfig(r=3, rank_pattern={"q_proj": 5}, target_modules=["q_proj", "down_proj"]),
        "rslora": peft.LoraConfig(r=16, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=EVERYTHING),
        "embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        "trained copies": peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
        ),
        "vera": peft.VeraConfig(r=16, target_modules=["q_proj", "o_proj"]),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }


def made(
    model: Any, config: Any, folder: Path, seed: int, prompts: list[list[int]], count: int, strength: float
) -> list[list[int]]:
    """Save an adapter that changes what the model says; PEFT's answers with it."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                small = "vera" in name or "ia3" in name
                noise = 0.5 if small else strength * float(parameter.std().clamp(0.02, 0.1))
                parameter.add_(torch.randn_like(parameter) * noise)
    wrapped.save_pretrained(folder)
    answers = generated(wrapped, prompts, count)
    wrapped.unload()
    return answers


@torch.inference_mode()
def generated(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        answer = model.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=EOS,
        )  # fmt: skip
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


def served_at_once(
    model: Any, tokenizer: Any, jobs: list[tuple[AdapterVersion | None, list[int], list[int]]], kv_tokens: int
) -> None:
    limits = EngineLimits(running=12, step_tokens=40)
    with Engine(TransformersRunner(model, kv_tokens=kv_tokens), tokenizer, limits=limits) as engine:
        streams = [engine.submit(request(prompt, of, max_tokens=len(want))) for of, prompt, want in jobs]
        for stream, (of, _, want) in zip(streams, jobs, strict=True):
            tokens, finish = read(stream, 300)
            assert finish.error is None
            assert ids(tokens) == want, of
            assert "".join(token.text for token in tokens) == tokenizer.decode(want, skip_special_tokens=True)


def jobs_of(
    fresh: Any, folder: Path, chosen: dict[str, Any], prompts: list[list[int]], count: int, strength: float
) -> list[tuple[AdapterVersion | None, list[int], list[int]]]:
    jobs: list[tuple[AdapterVersion | None, list[int], list[int]]] = []
    base = generated(fresh(), prompts, count)
    jobs += [(None, prompt, want) for prompt, want in zip(prompts, base, strict=True)]
    for seed, (name, config) in enumerate(chosen.items()):
        answers = made(fresh(), config, folder / name, seed, prompts, count, strength)
        assert answers != base
        version = make_version(read_adapter(folder / name), name, 1, str(folder / name))
        jobs += [(version, prompt, want) for prompt, want in zip(prompts, answers, strict=True)]
    return jobs


def test_adapters_of_peft(tmp_path: Path) -> None:
    prompts = [[(7 * i + 3 * j) % EOS for j in range(n)] for i, n in enumerate((4, 33))]
    jobs = jobs_of(lambda: tiny_decoder("llama"), tmp_path, configs(), prompts, 12, 0.6)
    served_at_once(tiny_decoder("llama"), byte_tokenizer(), jobs, 2048)


@pytest.mark.slow
@pytest.mark.model
def test_adapters_of_peft_on_smollm2(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    texts = ["The capital of France is", "Ein kurzer Satz über Züge: " * 4, "def add(a, b):\n    "]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    chosen = {name: config for name, config in configs().items() if name != "trained copies"}
    jobs = jobs_of(lambda: deepcopy(model), tmp_path, chosen, prompts, 16, 2.0)
    served_at_once(model, tokenizer, jobs, 4096)
