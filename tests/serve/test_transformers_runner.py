"""Preparing and forgetting adapters: what is refused and why, what is left behind, and from which thread."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.attach.attachments import kept_by
from lorakit.errors import AdapterIncompatibleError
from lorakit.serve.runner import Piece, Segment, StepBatch
from lorakit.serve.transformers_runner import TransformersRunner
from lorakit.serve.versions import AdapterVersion, make_version
from tests.serve.tiny_serving import (
    EOS,
    PROMPT,
    alone,
    ids,
    random_state,
    read,
    request,
    tiny_decoder,
    tiny_engine,
    versions_of,
)


def version(model: Any, method: Any, targets: list[str] | None = None, name: str = "x") -> AdapterVersion:
    return make_version(random_state(model, method, targets, 1, 0.3), name, 1, "memory")


def logits(runner: TransformersRunner, of: AdapterVersion | None) -> torch.Tensor:
    slab = runner.arena.reserve(len(PROMPT))
    assert slab is not None
    n = len(PROMPT)
    row = torch.tensor(PROMPT)
    out = runner.step(
        StepBatch(row, torch.arange(n), [Segment(0, n, of)], [Piece(0, n, 0, slab)], torch.tensor([n - 1]))
    )
    slab.free()
    return out


@pytest.mark.parametrize("method", [lk.PrefixTuning(length=3), lk.PromptTuning(length=3)])
def test_what_stands_in_front_of_a_request_is_refused(method: Any) -> None:
    model = tiny_decoder("llama")
    lk.attach(model, method, name="p")
    state = lk.extract(model, "p")
    lk.detach(model)
    runner = TransformersRunner(model, kv_tokens=512)
    with pytest.raises(AdapterIncompatibleError, match=f"{type(method).__name__}.*cannot be told apart"):
        runner.prepare(make_version(state, "p", 1, "memory"))
    assert kept_by(runner.model) is None


def test_an_adapter_of_another_model_is_refused_with_its_target() -> None:
    runner = TransformersRunner(tiny_decoder("llama"), kv_tokens=512)
    with pytest.raises(AdapterIncompatibleError, match=r"h\.0\.attn"):
        runner.prepare(version(tiny_decoder("gpt2"), lk.LoRA(r=2)))
    assert kept_by(runner.model) is None


def norms(model: Any) -> list[str]:
    return [path + ".weight" for path, m in model.named_modules() if path.endswith("norm")]


@pytest.mark.parametrize(
    ("name", "method", "targets"),
    [
        ("llama", lk.FullFineTuning(), "norms"),
        ("llama", lk.FullFineTuning(), ["embed_tokens", "lm_head"]),
        ("llama-tied", lk.FullFineTuning(), ["embed_tokens"]),
        ("gpt2", lk.FullFineTuning(), ["wte", "ln_f"]),
        ("llama", lk.Houlsby(size=8), None),
        ("qwen3-moe", lk.LoRA(r=2), ["experts.gate_up_proj", "experts.down_proj"]),
        ("gemma2", lk.LoRA(r=2), ["lm_head"]),
        ("gpt2", lk.BitFit(), None),
    ],
)
def test_what_acts_elsewhere_than_on_an_output_is_exact_too(name: str, method: Any, targets: Any) -> None:
    stock = tiny_decoder(name)
    targets = norms(stock) if targets == "norms" else targets
    lora, odd = version(stock, lk.LoRA(r=2)), version(stock, method, targets)
    with tiny_engine(tiny_decoder(name)) as engine:
        jobs = [(of, [*PROMPT, i]) for i in range(3) for of in (None, odd, lora)]
        streams = [engine.submit(request(prompt, of, max_tokens=8)) for of, prompt in jobs]
        for (of, prompt), stream in zip(jobs, streams, strict=True):
            tokens, finish = read(stream)
            assert finish.error is None
            assert ids(tokens) == alone(stock, of, prompt, 8), of
    assert alone(stock, odd, PROMPT, 8) != alone(stock, None, PROMPT, 8)


def test_a_weight_that_is_read_outside_its_own_layer_is_refused() -> None:
    model = tiny_decoder("llama")

    class Rescaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    extra = Rescaled()
    model.model.extra = extra
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] * extra.scale,))
    odd = version(model, lk.FullFineTuning(), ["model.extra.scale"])
    runner = TransformersRunner(model, kv_tokens=512)
    with pytest.raises(
        AdapterIncompatibleError, match=r"model\.extra\.scale.*cannot be routed token by token"
    ):
        runner.prepare(odd)
    assert kept_by(runner.model) is None


def test_the_last_adapter_leaves_the_model_as_it_was() -> None:
    model = tiny_decoder("llama")
    versions = versions_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = TransformersRunner(model, kv_tokens=512)
    base = logits(runner, None)
    for one in versions.values():
        runner.prepare(one)
        runner.prepare(one)
    assert torch.equal(logits(runner, None), base)
    for one in versions.values():
        runner.forget(one)
        runner.forget(one)
    assert kept_by(model) is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(runner, None), base)


def test_the_same_content_read_again_outlives_the_first_reading() -> None:
    model = tiny_decoder("llama")
    first = version(model, lk.LoRA(r=2))
    again = dataclasses.replace(first)
    runner = TransformersRunner(model, kv_tokens=512)
    runner.prepare(first)
    want = logits(runner, first)
    runner.prepare(again)
    runner.forget(first)
    assert torch.equal(logits(runner, again), want)
    runner.forget(again)
    assert kept_by(model) is None


def test_adapters_come_and_go_while_steps_run() -> None:
    stock = tiny_decoder("llama")
    versions = list(versions_of(stock).values())
    steady, others = versions[0], versions[1:]
    right = alone(stock, steady, PROMPT, 100)
    with tiny_engine(tiny_decoder("llama")) as engine:
        stop, failed = threading.Event(), []

        def churn(mine: list[AdapterVersion]) -> None:
            try:
                while not stop.is_set():
                    for one in mine:
                        engine.runner.prepare(one)
                        engine.forget(one)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=churn, args=(others[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        answers = [ids(read(engine.submit(request(PROMPT, steady, max_tokens=100)))[0]) for _ in range(3)]
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failed
    assert answers == [right] * 3


def test_half_precision_files_act_as_their_numbers_in_full() -> None:
    model = tiny_decoder("llama")
    state = random_state(model, lk.LoRA(r=4), None, 3).to(torch.bfloat16)
    half = make_version(state, "half", 1, "memory")
    full = make_version(state.to(torch.float32), "full", 1, "memory")
    runner = TransformersRunner(model, kv_tokens=512)
    runner.prepare(half)
    runner.prepare(full)
    assert torch.equal(logits(runner, half), logits(runner, full))


def test_context_and_vocabulary() -> None:
    assert TransformersRunner(tiny_decoder("llama"), kv_tokens=512).context == 256
    assert TransformersRunner(tiny_decoder("llama"), kv_tokens=130).context == 128
    runner = TransformersRunner(tiny_decoder("llama"), kv_tokens=512, context=99)
    assert runner.context == 99
    assert runner.vocabulary == EOS + 1
