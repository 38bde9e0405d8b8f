"""What the engine answers, what it refuses at once, and what it says of itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from lorakit.errors import (
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
    RateLimitError,
)
from lorakit.serve.engine import Engine
from lorakit.serve.requests import PromptEvent, TokenEvent
from lorakit.serve.sampling import Sampling
from lorakit.serve.scheduler import EngineLimits
from tests.serve.tiny_serving import (
    EOS,
    PROMPT,
    CountedLease,
    alone,
    byte_tokenizer,
    ids,
    read,
    request,
    tiny_decoder,
    tiny_engine,
)
from tests.serve.watched_runner import STOCK, VERSIONS, Watched, steps_until


# ---- answers
def test_end_of_text_ends_an_answer_and_is_not_text(engine: Engine) -> None:
    tokens, finish = read(
        engine.submit(
            request(PROMPT, sampling=Sampling(temperature=0, logit_bias={EOS: 100}), ignore_eos=False)
        )
    )
    assert (ids(tokens), tokens[0].text) == ([EOS], "")
    assert (finish.reason, finish.matched) == ("stop", EOS)
    assert finish.usage == (len(PROMPT), 1, 0)


def test_stop_tokens_and_texts(engine: Engine) -> None:
    tokens, _ = read(engine.submit(request(PROMPT, max_tokens=20)))
    text = "".join(token.text for token in tokens)
    stop = text[6:9]
    shorter, finish = read(engine.submit(request(PROMPT, max_tokens=20, stop=(stop,))))
    assert "".join(token.text for token in shorter) == text[: text.index(stop)]
    assert (finish.reason, finish.matched) == ("stop", stop)
    third = ids(tokens)[2]
    fewer, finish = read(engine.submit(request(PROMPT, max_tokens=20, stop_token_ids=(third,))))
    assert ids(fewer) == ids(tokens)[: ids(tokens).index(third) + 1]
    assert finish.matched == third


def test_a_part_of_a_stop_text_at_the_end_is_text(engine: Engine) -> None:
    tokens, _ = read(engine.submit(request(PROMPT, max_tokens=9)))
    text = "".join(token.text for token in tokens)
    again, finish = read(engine.submit(request(PROMPT, max_tokens=9, stop=(text[-2:] + "never",))))
    assert "".join(token.text for token in again) == text
    assert finish.reason == "length"


def test_several_answers_share_their_prompt_and_differ(engine: Engine) -> None:
    prompt = PROMPT * 10
    before = engine.state().prompt_tokens
    sampling = Sampling(temperature=1.0, seed=5)
    found: dict[int, list[int]] = {}
    for event in engine.submit(request(prompt, VERSIONS["dora"], sampling=sampling, n=3, max_tokens=10)):
        if isinstance(event, TokenEvent):
            found.setdefault(event.index, []).append(event.token_id)
    assert engine.state().prompt_tokens - before == len(prompt)
    assert sorted(found) == [0, 1, 2]
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    one, _ = read(engine.submit(request(prompt, VERSIONS["dora"], sampling=sampling, max_tokens=10)))
    assert ids(one) == found[0]
    greedy = engine.submit(request(prompt, VERSIONS["dora"], n=2, max_tokens=10))
    texts = greedy.texts()
    assert texts[0] == texts[1]


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    prompt = PROMPT * 8  # more than a step reads
    stream = engine.submit(request(prompt, logprobs=2, prompt_logprobs=1, max_tokens=4))
    events = list(stream)
    assert isinstance(events[0], PromptEvent)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    whole = torch.tensor([prompt + ids(tokens)])
    with torch.inference_mode():
        logs = STOCK(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
    said = [logprob for _, logprob, _ in events[0].tokens]
    want = logs[:-1].gather(-1, whole[0, 1:, None])[:, 0].tolist()
    assert [token for token, _, _ in events[0].tokens] == prompt
    assert said[0] is None
    assert said[1:] == pytest.approx(want[: len(prompt) - 1], abs=1e-4)
    assert [token.logprob for token in tokens] == pytest.approx(want[len(prompt) - 1 :], abs=1e-4)
    best = logs[len(prompt) - 1].topk(2)
    assert [pair.token_id for pair in tokens[0].top_logprobs or ()] == best.indices.tolist()
    likeliest = [top[0].token_id for _, _, top in events[0].tokens if top]
    assert likeliest == logs[: len(prompt) - 1].argmax(-1).tolist()


def test_from_asyncio_many_at_a_time(engine: Engine) -> None:
    async def one(i: int) -> list[int]:
        found = []
        async for event in engine.submit(request([*PROMPT, i], max_tokens=6)):
            if isinstance(event, TokenEvent):
                found.append(event.token_id)
        return found

    async def main() -> list[list[int]]:
        return await asyncio.gather(*map(one, range(4)))

    assert asyncio.run(main()) == [alone(STOCK, None, [*PROMPT, i], 6) for i in range(4)]


# ---- what is refused at once
def refused(engine: Engine, error: type[Exception], match: str, **settings: Any) -> None:
    asked = request(settings.pop("prompt", PROMPT), VERSIONS["lora-2"], **settings)
    with pytest.raises(error, match=match):
        engine.submit(asked)
    assert isinstance(asked.lease, CountedLease)
    assert asked.lease.returned == 1


def test_what_can_never_be_answered_is_refused_and_its_adapter_given_back(engine: Engine) -> None:
    refused(engine, ContextLengthError, "context is 256 tokens", max_tokens=251)
    refused(engine, ContextLengthError, "n=7", n=7)
    refused(engine, InvalidRequestError, "prompt has the token 320", prompt=[320])
    refused(engine, InvalidRequestError, "prompt has the token -1", prompt=[-1])
    refused(engine, InvalidRequestError, "stop_token_ids", stop_token_ids=(999,))
    refused(engine, InvalidRequestError, "logit_bias", sampling=Sampling(logit_bias={999: 1.0}))
    read(engine.submit(request(PROMPT, max_tokens=250)))


def test_queues_are_bounded_for_all_and_for_each_tenant(runner: Watched) -> None:
    limits = EngineLimits(running=2, step_tokens=8, waiting=4, waiting_per_tenant=2)
    engine = Engine(runner, byte_tokenizer(), limits=limits).start()
    running = [engine.submit(request(PROMPT, max_tokens=200)) for _ in range(2)]
    steps_until(lambda: engine.state().running == 2)
    runner.gate.clear()
    waiting = [engine.submit(request(PROMPT, max_tokens=2, tenant="a")) for _ in range(2)]
    refused(engine, RateLimitError, "2 of your requests", tenant="a")
    waiting += [engine.submit(request(PROMPT, max_tokens=2, tenant="b")) for _ in range(2)]
    refused(engine, OverloadedError, "4 requests are waiting", tenant="c")
    assert engine.state().waiting == 4
    runner.gate.set()
    assert [read(stream)[1].reason for stream in (*running, *waiting)] == ["length"] * 6
    engine.stop()


def test_two_requests_of_one_name_are_not_mixed_up(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    first = engine.submit(request(PROMPT, max_tokens=3, id="same"))
    refused(engine, InvalidRequestError, "'same' is running", id="same")
    runner.gate.set()
    assert read(first)[1].reason == "length"
    assert read(engine.submit(request(PROMPT, max_tokens=3, id="same")))[1].reason == "length"


# ---- what it tells
def test_the_state_is_what_runs_and_waits(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    streams = [engine.submit(request(PROMPT, VERSIONS["dora"], max_tokens=5, n=2))]
    steps_until(lambda: engine.state().waiting == 0)
    streams += [engine.submit(request(PROMPT, None, max_tokens=5)) for _ in range(2)]
    state = engine.state()
    assert (state.running, state.waiting) == (2, 2)
    assert state.running_adapters == {"dora": 2}
    assert state.waiting_adapters == {None: 2}
    assert state.kv_tokens == 128
    runner.gate.set()
    for stream in streams:
        stream.texts()
    state = engine.state()
    assert (state.running, state.waiting, state.kv_tokens) == (0, 0, 0)
    assert state.generated_tokens == 20
    assert state.prompt_tokens == 18
    assert state.tokens_per_second == pytest.approx(2.0)
    assert state.steps == len(runner.batches)


def test_times_are_in_order(engine: Engine) -> None:
    _, finish = read(engine.submit(request(PROMPT, max_tokens=5)))
    timing = finish.timing
    assert timing is not None
    assert timing.admitted is not None
    assert timing.first_token is not None
    assert 0 <= timing.admitted <= timing.first_token <= timing.finished


def test_a_large_request_is_not_passed_by_small_ones_for_ever() -> None:
    with tiny_engine(tiny_decoder("llama"), kv_tokens=256, running=16, step_tokens=64, aging=0.05) as engine:
        stop, small = threading.Event(), []

        def press() -> None:
            while not stop.is_set():
                small.append(read(engine.submit(request(PROMPT, max_tokens=20)))[1].reason)

        threads = [threading.Thread(target=press) for _ in range(5)]
        for thread in threads:
            thread.start()
        steps_until(lambda: len(small) > 3)
        _, finish = read(engine.submit(request(PROMPT, max_tokens=250)))  # all of the KV cache
        stop.set()
        for thread in threads:
            thread.join(30)
    assert finish.reason == "length"
    assert set(small) == {"length"}
