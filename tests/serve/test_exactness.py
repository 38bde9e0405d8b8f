"""Every token of every request is what `generate` gives for its adapter alone, whatever else runs beside it."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import AdapterIncompatibleError
from lorakit.ops.native.decoder import Kernel, kernel
from lorakit.serve.engine import Engine
from lorakit.serve.native_runner import NativeRunner
from lorakit.serve.runner import ModelRunner
from lorakit.serve.scheduler import EngineLimits
from lorakit.serve.transformers_runner import TransformersRunner
from tests.serve.tiny_serving import (
    CONFIGS,
    EOS,
    adapter_kinds,
    alone,
    attached,
    byte_tokenizer,
    ids,
    read,
    request,
    tiny_decoder,
    versions_of,
)

_MADE: dict[str, tuple[Any, ModelRunner, dict[str, Any]]] = {}
_KNOWN: dict[tuple[str, str | None, tuple[int, ...]], list[int]] = {}
LONGEST = 12


COMPILED = ", compiled"
needs_the_step = pytest.mark.skipif(not isinstance(kernel(), Kernel), reason="the compiled step is not built")


def compiled(name: str) -> Any:
    """A model that the compiled step runs."""
    return pytest.param(name + COMPILED, marks=needs_the_step)


def served(name: str) -> tuple[Any, ModelRunner, dict[str, Any]]:
    """A stock model, a runner over an equal one, and the adapters for both that the runner can run."""
    if name not in _MADE:
        kind = name.removesuffix(COMPILED)
        stock = tiny_decoder(kind)
        versions = versions_of(stock)
        runner: ModelRunner
        if kind == name:
            runner = TransformersRunner(tiny_decoder(kind), kv_tokens=2048)
        else:
            runner = NativeRunner(tiny_decoder(kind), kv_tokens=2048, threads=1)
            versions = {label: version for label, version in versions.items() if _runs(runner, version)}
            assert len(versions) >= 4
        _MADE[name] = stock, runner, versions
    return _MADE[name]


def _runs(runner: ModelRunner, version: Any) -> bool:
    try:
        runner.prepare(version)
    except AdapterIncompatibleError:
        return False
    return True


def reference(name: str, kind: str | None, prompt: list[int]) -> list[int]:
    stock, _, versions = served(name)
    key = (name, kind, tuple(prompt))
    if key not in _KNOWN:
        _KNOWN[key] = alone(stock, None if kind is None else versions[kind], prompt, LONGEST)
    return _KNOWN[key]


@torch.inference_mode()
def is_tie(name: str, kind: str | None, prompt: list[int], right: list[int], found: list[int]) -> bool:
    """Whether two answers part where two tokens are equally likely up to rounding."""
    stock, _, versions = served(name)
    at = next(i for i, (a, b) in enumerate(zip(right, found, strict=False)) if a != b)
    with attached(stock, None if kind is None else versions[kind]):
        logits = stock(input_ids=torch.tensor([prompt + right[:at]]), use_cache=False).logits[0, -1]
    return bool((logits[right[at]] - logits[found[at]]).abs() < 1e-4 * logits.abs().max())


def check(name: str, kind: str | None, prompt: list[int], found: list[int]) -> None:
    right = reference(name, kind, prompt)[: len(found)]
    assert found == right or is_tie(name, kind, prompt, right, found), (kind, right, found)


def some_prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(EOS) for _ in range(length)]


def test_adapters_of_all_kinds_are_tried() -> None:
    _, _, versions = served("llama")
    assert set(versions) == set(adapter_kinds(tiny_decoder("llama")))


def test_the_adapters_change_the_answers() -> None:
    prompt = some_prompt(20, 4)
    _, _, versions = served("llama")
    answers = {tuple(reference("llama", kind, prompt)) for kind in (None, *versions)}
    assert len(answers) == len(versions) + 1


@pytest.mark.parametrize("name", [*CONFIGS, compiled("qwen3"), compiled("gemma")])
def test_all_adapters_at_once(name: str) -> None:
    _, runner, versions = served(name)
    limits = EngineLimits(running=24, step_tokens=40)
    jobs = [(kind, some_prompt(5 + 7 * i, i)) for i, kind in enumerate((None, *versions, None, *versions))]
    with Engine(runner, byte_tokenizer(), limits=limits) as engine:
        streams = [
            engine.submit(request(prompt, versions.get(kind), max_tokens=LONGEST)) for kind, prompt in jobs
        ]
        for stream, (kind, prompt) in zip(streams, jobs, strict=True):
            tokens, finish = read(stream)
            assert finish.error is None
            assert len(tokens) == LONGEST
            check(name, kind, prompt, ids(tokens))
    assert runner.arena.used == 0


jobs_of_a_run = st.lists(
    st.tuples(
        st.integers(0, 9),  # adapter
        st.integers(1, 70),  # prompt
        st.integers(1, LONGEST),  # answer
        st.integers(0, 3),  # milliseconds until the next comes
        st.one_of(st.none(), st.integers(0, 4)),  # cancelled after so many tokens
        st.sampled_from([None, "a", "b"]),  # tenant
    ),
    min_size=1,
    max_size=10,
)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mistral-window", compiled("qwen3")])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    jobs=jobs_of_a_run,
    step=st.integers(4, 60),
    running=st.integers(1, 12),
    most=st.sampled_from([None, 1, 2]),
    cache=st.sampled_from([0, 1 << 20]),
)
def test_any_mixture(
    name: str, jobs: list[Any], step: int, running: int, most: int | None, cache: int
) -> None:
    _, runner, versions = served(name)
    kinds = [None, *versions]
    limits = EngineLimits(
        step_tokens=max(step, running + 1),
        running=running,
        adapters_per_step=most,
        prefix_cache_bytes=cache,
        aging=0.05,
    )
    with Engine(runner, byte_tokenizer(), limits=limits) as engine:
        begun = []
        for adapter, length, count, pause, cancelled, tenant in jobs:
            kind = kinds[adapter % len(kinds)]
            # Few different prompts, and long ones that begin alike: so that the prefix cache has something to find.
            prompt = some_prompt(length, 0)
            asked = request(prompt, versions.get(kind), max_tokens=count, tenant=tenant)
            begun.append((kind, prompt, count, cancelled, asked, engine.submit(asked)))
            time.sleep(pause / 1000)
        for kind, prompt, count, cancelled, asked, stream in begun:
            found = []
            if cancelled is not None:
                for _ in range(min(cancelled, count)):
                    found.append(stream.get(30))
                stream.cancel()
            tokens, finish = read(stream)
            assert finish.error is None
            answer = ids([*found, *tokens])
            assert finish.reason == "length" if len(answer) == count else "abort"
            check(name, kind, prompt, answer)
            assert asked.lease is None or asked.lease.returned == 1
    assert runner.arena.used == 0


def test_the_base_is_untouched_by_adapters_beside_it() -> None:
    _, runner, versions = served("llama")
    prompts = [some_prompt(11, i) for i in range(len(versions))]
    before = [reference("llama", None, prompt) for prompt in prompts]
    with Engine(runner, byte_tokenizer(), limits=EngineLimits(running=24, step_tokens=64)) as engine:
        pairs = []
        for prompt, version in zip(prompts, versions.values(), strict=True):
            pairs.append(engine.submit(request(prompt, None, max_tokens=LONGEST)))
            engine.submit(request(prompt, version, max_tokens=LONGEST))
        answers = [ids(read(stream)[0]) for stream in pairs]
    assert answers == before


def test_a_row_of_the_base_has_the_same_logits_bit_for_bit_with_an_adapter_beside_it() -> None:
    from lorakit.serve.runner import Piece, Segment, StepBatch

    _, runner, versions = served("llama")
    version = versions["lora-7"]
    runner.prepare(version)
    row = torch.tensor(some_prompt(16, 1))
    slabs = [runner.arena.reserve(8) for _ in range(2)]
    pieces = [Piece(0, 8, 0, slabs[0]), Piece(8, 16, 0, slabs[1])]
    positions, last = torch.arange(8).repeat(2), torch.tensor([7, 15])
    plain = runner.step(StepBatch(row, positions, [Segment(0, 16, None)], pieces, last))
    mixed = runner.step(
        StepBatch(row, positions, [Segment(0, 8, None), Segment(8, 16, version)], pieces, last)
    )
    assert torch.equal(plain[0], mixed[0])
    assert not torch.allclose(plain[1], mixed[1], atol=1e-2)
    for slab in slabs:
        slab.free()
