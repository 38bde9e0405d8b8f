"""`/v1/completions`: prompts as text or tokens, several at once, echo, and the older form of log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorakit as lk
from tests.serve.api.test_chat import streamed
from tests.serve.http_world import BASE, World, error_of
from tests.tiny_chat import tiny_model, tiny_tokenizer


def ask(world: World, **body: Any) -> dict[str, Any]:
    answer = world.post("/v1/completions", {"model": "sql", "temperature": 0, "max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_goes_on_from_the_text_itself(world: World) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    lk.load(model, world.adapters / "sql")
    ids = torch.tensor([tokenizer("select 1")["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    body = ask(world, prompt="select 1")
    assert body["choices"][0]["text"] == wanted
    assert body["object"] == "text_completion"
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}
    assert ask(world, prompt=ids[0].tolist())["choices"] == body["choices"]


def test_several_prompts_at_once(world: World) -> None:
    texts = ["one", "two and more", "three"]
    alone = [ask(world, prompt=text)["choices"][0]["text"] for text in texts]
    together = ask(world, prompt=texts)
    assert [c["text"] for c in together["choices"]] == alone
    assert [c["index"] for c in together["choices"]] == [0, 1, 2]
    assert together["usage"]["completion_tokens"] == 24
    assert together["usage"]["prompt_tokens"] == sum(map(len, texts))
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    assert [c["text"] for c in ask(world, prompt=ids)["choices"]] == alone
    two = ask(world, prompt=texts, n=2, temperature=1.2, seed=3)
    assert [c["index"] for c in two["choices"]] == [0, 1, 2, 3, 4, 5]
    events = streamed(
        world, {"model": "sql", "temperature": 0, "max_tokens": 8, "prompt": texts}, "/v1/completions"
    )
    for index, text in enumerate(alone):
        own = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == text
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]
    world.idle()
    assert world.server.store.entry("sql").in_use == 0


def test_echo(world: World) -> None:
    text = ask(world, prompt="again")["choices"][0]["text"]
    assert ask(world, prompt="again", echo=True)["choices"][0]["text"] == "again" + text
    ids = tiny_tokenizer()("again")["input_ids"]
    assert ask(world, prompt=ids, echo=True)["choices"][0]["text"] == "again" + text
    body = {"model": "sql", "temperature": 0, "max_tokens": 8, "prompt": "again", "echo": True}
    events = streamed(world, body, "/v1/completions")
    assert "".join(e["choices"][0]["text"] for e in events) == "again" + text


def test_logprobs_are_parallel_lists(world: World) -> None:
    logprobs = ask(world, prompt="abc", logprobs=2, max_tokens=5)["choices"][0]["logprobs"]
    assert [len(value) for value in logprobs.values()] == [5, 5, 5, 5]
    assert logprobs["text_offset"][0] == 0
    for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert max(top.values()) == own
    body = {"model": "sql", "temperature": 0, "max_tokens": 5, "prompt": "abc", "logprobs": 2}
    told = [e["choices"][0]["logprobs"] for e in streamed(world, body, "/v1/completions")]
    parts = [part for part in told if part is not None]
    assert [t for part in parts for t in part["tokens"]] == logprobs["tokens"]
    assert [t for part in parts for t in part["text_offset"]] == logprobs["text_offset"]


def test_echo_with_logprobs_tells_those_of_the_prompt(world: World) -> None:
    """What `lm-evaluation-harness` asks of a server to score texts."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    lk.load(model, world.adapters / "sql")
    texts = ["select 1 from t", "é"]
    body = ask(world, prompt=texts, echo=True, logprobs=2, max_tokens=3, n=2, temperature=1.0, seed=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        text = texts[choice["index"] // 2]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            own = model(input_ids=ids).logits[0].log_softmax(-1)
        logprobs, count = choice["logprobs"], ids.shape[1]
        assert choice["text"].startswith(text)
        assert {len(value) for value in logprobs.values()} == {count + 3}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        wanted = own[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert logprobs["token_logprobs"][1:count] == pytest.approx(wanted, abs=1e-3)
        assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
        assert logprobs["text_offset"][0] == 0
        assert logprobs["text_offset"][count] == len(text)
    request = {
        "model": "sql",
        "temperature": 0,
        "max_tokens": 3,
        "prompt": texts[0],
        "echo": True,
        "logprobs": 1,
    }
    whole = ask(world, **request)["choices"][0]
    told = [e["choices"][0] for e in streamed(world, request, "/v1/completions")]
    assert "".join(c["text"] for c in told) == whole["text"]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [v for c in told if c["logprobs"] for v in c["logprobs"][name]] == whole["logprobs"][name]


def test_sixteen_tokens_unless_told(world: World) -> None:
    answer = world.post("/v1/completions", {"model": BASE, "prompt": "a", "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [100000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 16}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_mistakes(world: World, change: dict[str, Any], param: str | None) -> None:
    answer = world.post("/v1/completions", {"model": "sql", "prompt": "a", **change})
    assert error_of(answer) == (400, "invalid_request_error", "invalid_request", param)
