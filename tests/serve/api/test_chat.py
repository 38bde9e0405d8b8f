"""`/v1/chat/completions`: the answers are the model's own, whole and streamed, with everything that may be asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.models.conversation import ConversationRenderer
from tests.serve.http_world import BASE, World, chat, error_of
from tests.tiny_chat import tiny_model, tiny_tokenizer


def by_hand(world: World, adapter: str | None, text: str, most: int = 12) -> str:
    """What the tiny model says with lorakit's own attach and transformers' own greedy search."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if adapter is not None:
        lk.load(model, world.adapters / adapter)
    ids = torch.tensor([ConversationRenderer(tokenizer).prompt([{"role": "user", "content": text}])])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def streamed(world: World, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
    """The events of a stream; checks how it ends."""
    with world.client() as client, client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.parametrize("adapter", [None, "sql", "style"])
def test_the_answer_is_what_the_model_says(world: World, adapter: str | None) -> None:
    for text in ("hello", "What is 1 + 1?", "Ünïcödé 🙂"):
        assert world.ask(adapter or BASE, text) == by_hand(world, adapter, text)


def test_adapters_differ(world: World) -> None:
    assert len({world.ask(name) for name in (BASE, "sql", "style", "sql:0.5+style:0.5")}) == 4


def test_shape_of_an_answer(world: World) -> None:
    answer = world.post("/v1/chat/completions", chat("sql", max_tokens=3), headers={"X-Request-Id": "mine-1"})
    body = answer.json()
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-adapter-version"] == "sql@1"
    assert body["object"] == "chat.completion"
    assert body["model"] == "sql"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["role"] == "assistant"
    usage = body["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    base = world.post("/v1/chat/completions", chat(BASE, max_tokens=3))
    assert "x-adapter-version" not in base.headers
    assert base.json()["system_fingerprint"] != body["system_fingerprint"]


def test_a_strange_request_id_is_replaced(world: World) -> None:
    answer = world.get("/v1/models", headers={"X-Request-Id": 'a"b{}'})
    assert answer.headers["x-request-id"].startswith("req-")


def test_stream_says_the_same(world: World) -> None:
    whole = world.ask("sql", "stream me", max_tokens=40)
    events = streamed(world, chat("sql", "stream me", max_tokens=40))
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == whole
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_stream_with_usage(world: World) -> None:
    events = streamed(world, chat("sql", max_tokens=5, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5


def test_many_answers(world: World) -> None:
    body = chat(BASE, n=3, temperature=1.5, seed=4, max_tokens=8)
    first, again = (world.post("/v1/chat/completions", body).json()["choices"] for _ in range(2))
    assert [c["index"] for c in first] == [0, 1, 2]
    assert first == again
    assert len({c["message"]["content"] for c in first}) > 1
    events = streamed(world, body)
    for choice in first:
        pieces = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in pieces) == choice["message"]["content"]
    other = world.post("/v1/chat/completions", {**body, "seed": 5}).json()["choices"]
    assert other != first


def test_stop_strings(world: World) -> None:
    whole = world.ask("style", max_tokens=30)
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    answer = world.post("/v1/chat/completions", chat("style", max_tokens=30, stop=[stop, "nowhere"])).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    events = streamed(world, chat("style", max_tokens=30, stop=stop))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole[: whole.index(stop)]


def test_logprobs(world: World) -> None:
    body = chat("sql", max_tokens=4, logprobs=True, top_logprobs=3)
    choice = world.post("/v1/chat/completions", body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        tops = token["top_logprobs"]
        assert len(tops) == 3
        assert tops[0]["logprob"] == token["logprob"]  # greedy: the likeliest is taken
        assert sorted((t["logprob"] for t in tops), reverse=True) == [t["logprob"] for t in tops]
    text = bytes(byte for token in content for byte in token["bytes"]).decode(errors="replace")
    assert text == choice["message"]["content"]
    told = [e["choices"][0]["logprobs"] for e in streamed(world, body)]
    assert [token for part in told if part for token in part["content"]] == content
    assert world.post("/v1/chat/completions", chat("sql")).json()["choices"][0]["logprobs"] is None


def test_logit_bias_and_stop_tokens(world: World) -> None:
    letter = tiny_tokenizer().convert_tokens_to_ids("x")
    assert world.ask(BASE, logit_bias={str(letter): 100}, max_tokens=5) == "xxxxx"
    body = chat(BASE, logit_bias={str(letter): 100}, stop_token_ids=[letter])
    choice = world.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == ""


def test_penalties_and_sampling_reach_the_engine(world: World) -> None:
    greedy = world.ask("sql", max_tokens=40)
    for change in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert world.ask("sql", max_tokens=40, **change) != greedy
    assert world.ask("sql", max_tokens=40, temperature=2.0, top_k=1) == greedy
    assert world.ask("sql", max_tokens=40, temperature=2.0, min_p=1.0) == greedy
    assert world.ask("sql", max_tokens=40, temperature=2.0, top_p=0.0001) == greedy


def test_end_of_text_ends_unless_ignored(world: World) -> None:
    end = tiny_tokenizer().eos_token_id
    body = chat(BASE, logit_bias={str(end): 100}, max_tokens=6)
    ended = world.post("/v1/chat/completions", body).json()
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == 1
    ignored = world.post("/v1/chat/completions", {**body, "ignore_eos": True}).json()
    assert ignored["usage"]["completion_tokens"] == 6


def test_messages_in_parts_and_the_system(world: World) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = {**chat("sql"), "messages": [{"role": "user", "content": parts}]}
    assert world.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == world.ask(
        "sql"
    )
    answers = {
        world.post(
            "/v1/chat/completions",
            {**chat("sql"), "messages": [{"role": role, "content": "Be brief."}, *chat("sql")["messages"]]},
        ).json()["choices"][0]["message"]["content"]
        for role in ("system", "developer")
    }
    assert len(answers) == 1  # the same turn under its two names
    assert answers != {world.ask("sql")}


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ({"type": "choice", "choice": ["red", "green"]}, lambda text: text in ("red", "green")),
        ({"type": "regex", "regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdigit()),
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": {
                        "type": "object",
                        "properties": {"ok": {"type": "boolean"}},
                        "required": ["ok"],
                        "additionalProperties": False,
                    },
                },
            },
            lambda text: isinstance(json.loads(text)["ok"], bool),
        ),
    ],
)
def test_structured_answers(world: World, kind: dict[str, Any], check: Any) -> None:
    assert check(world.ask("sql", response_format=kind, max_tokens=60).strip())


def test_structured_outputs_as_vllm_writes_them(world: World) -> None:
    assert world.ask(BASE, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")


def test_a_grammar_that_is_none(world: World) -> None:
    answer = world.post("/v1/chat/completions", chat(BASE, response_format={"type": "regex", "regex": "(["}))
    assert error_of(answer)[:3] == (400, "invalid_request_error", "invalid_request")


def test_fields_that_frameworks_always_send(world: World) -> None:
    body = chat(
        "sql", user="someone", metadata={"a": "b"}, store=False, tools=None, tool_choice=None, audio=None
    )
    assert world.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tempratur": 1}, "tempratur"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"top_logprobs": 2}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_mistakes_name_their_field(world: World, change: dict[str, Any], param: str | None) -> None:
    answer = world.post("/v1/chat/completions", {**chat("sql"), **change})
    assert error_of(answer) == (400, "invalid_request_error", "invalid_request", param)


def test_bodies_that_are_no_json(world: World) -> None:
    with world.client() as client:
        for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000):
            answer = client.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert error_of(answer)[0] == 400, body[:20]
        answer = client.post("/v1/chat/completions", content=b"a=b", headers={"content-type": "text/plain"})
        assert error_of(answer)[0] == 400


def test_unknown_paths_and_methods(world: World) -> None:
    assert error_of(world.get("/v1/nothing")) == (404, "not_found_error", "unknown_url", None)
    answer = world.get("/v1/chat/completions")
    assert error_of(answer) == (405, "invalid_request_error", "method_not_allowed", None)
    assert answer.headers["allow"] == "POST"
