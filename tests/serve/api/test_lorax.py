"""LoRAX's `/generate` and `/generate_stream`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.http_world import World, error_of


def ask(world: World, text: str = "hello", **parameters: Any) -> dict[str, Any]:
    answer = world.post("/generate", {"inputs": text, "parameters": {"max_new_tokens": 8, **parameters}})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def completion(world: World, model: str, text: str = "hello") -> str:
    body = {"model": model, "prompt": text, "max_tokens": 8, "temperature": 0}
    return str(world.post("/v1/completions", body).json()["choices"][0]["text"])


def test_adapters_by_their_id(world: World) -> None:
    for adapter in ("sql", "style"):
        assert ask(world, adapter_id=adapter)["generated_text"] == completion(world, adapter)
    assert ask(world)["generated_text"] == completion(world, "tiny")
    assert ask(world, adapter_id="")["generated_text"] == completion(world, "tiny")
    mix = {"ids": ["sql", "style"], "weights": [0.5, 0.5], "merge_strategy": "linear"}
    assert ask(world, merged_adapters=mix)["generated_text"] == completion(world, "sql:0.5+style:0.5")


def test_details(world: World) -> None:
    body = ask(world, adapter_id="sql", details=True, seed=1)
    details = body["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 8 == len(details["tokens"])
    assert details["prompt_tokens"] == 5
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special"}
    assert "details" not in ask(world, details=False)
    text = ask(world, adapter_id="style")["generated_text"]
    stop = next(c for c in text[2:] if c != "\ufffd" and c not in text[:2])
    stopped = ask(world, adapter_id="style", stop=[stop])
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == text[: text.index(stop)]


def test_full_text_and_template(world: World) -> None:
    assert ask(world, return_full_text=True)["generated_text"] == "hello" + ask(world)["generated_text"]
    templated = ask(world, adapter_id="sql", apply_chat_template=True)["generated_text"]
    assert templated == world.ask("sql", max_tokens=8)


def test_stream(world: World) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 8, "adapter_id": "sql"}}
    with world.client() as client, client.stream("POST", "/generate_stream", json=body) as answer:
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line]
    assert len(events) == 8
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == completion(world, "sql")
    assert events[-1]["details"]["generated_tokens"] == 8


def test_sampling(world: World) -> None:
    drawn = [ask(world, do_sample=True, temperature=1.5, seed=s)["generated_text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"adapter_id": "nope"}, (404, "model_not_found")),
        ({"adapter_id": "../sql"}, (400, "invalid_adapter_id")),
        ({"adapter_source": "hub"}, (400, "invalid_request")),
        (
            {"adapter_id": "sql", "merged_adapters": {"ids": ["sql"], "weights": [1]}},
            (400, "invalid_request"),
        ),
        ({"merged_adapters": {"ids": ["sql", "sql"], "weights": [1, 1]}}, (400, "invalid_request")),
        ({"merged_adapters": {"ids": ["sql"], "weights": []}}, (400, "invalid_request")),
        ({"watermark": True}, (400, "invalid_request")),
        ({"max_new_tokens": 5000}, (400, "context_length_exceeded")),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_mistakes(world: World, path: str, parameters: dict[str, Any], expected: tuple[int, str]) -> None:
    answer = world.post(path, {"inputs": "a", "parameters": parameters})
    status, _, code, _ = error_of(answer)
    assert (status, code) == expected
