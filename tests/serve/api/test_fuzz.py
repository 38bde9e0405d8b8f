"""Anything that may be sent, and much that may not: no answer is a 500, and every error has the one form."""

from __future__ import annotations

import warnings
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.http_world import BASE, World, chat

OPERATIONS = [
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/generate"),
    ("post", "/generate_stream"),
    ("post", "/v1/adapters"),
    ("delete", "/v1/adapters/{name}"),
    ("post", "/v1/adapters/{name}/pin"),
    ("post", "/v1/adapters/{name}/alias"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
    ("get", "/v1/models/{name}"),
    ("get", "/v1/adapters/{name}"),
]
schemathesis.checks.load_all_checks()
CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
]
BOUNDED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(answer: httpx.Response) -> None:
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert answer.status_code not in (500, 501, 502), answer.text


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_generated_from_the_servers_own_schema(world: World, method: str, path: str) -> None:
    document = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    paths = [p for p in document.raw_schema["paths"] if p.replace(":path", "") == path]
    operation = document[paths[0]][method.upper()]
    positive = operation.as_strategy()
    negative = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @BOUNDED
    @given(case=st.one_of(positive, negative))
    def ask(case: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _shorten(case.body)
            answer = case.call(base_url=world.url, timeout=60)
        case.validate_response(answer, checks=CHECKS)
        assert "Traceback" not in answer.text
        assert answer.status_code not in (500, 501, 502), answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        seen.add(answer.status_code)

    seen: set[int] = set()
    ask()
    assert seen & {400, 404, 409}
    world.idle()
    assert world.server.runner.arena.used == 0


def _shorten(body: Any) -> None:
    """Answers of a few tokens, in whatever time they take; half of the requests name a model that there is."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 4:
                body[name] = 4
        if isinstance(body.get("model"), str) and len(body["model"]) % 2:
            body["model"] = BASE
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 2)
        if isinstance(body.get("timeout"), float) and body["timeout"] > 0:
            body["timeout"] = 60.0  # a shorter one may pass in the queue, which is a 504 by right
        parameters = body.get("parameters")  # of LoRAX
        if isinstance(parameters, dict) and isinstance(parameters.get("max_new_tokens"), int):
            parameters["max_new_tokens"] = min(parameters["max_new_tokens"], 4)
        elif isinstance(parameters, dict) and "max_new_tokens" not in parameters:
            parameters["max_new_tokens"] = 4


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *chat("sql"),
    "top_k",
    "min_p",
    "seed",
    "stop",
    "logit_bias",
    "response_format",
    "stream",
    "n",
    "tools",
]


def test_one_field_of_a_good_request_is_anything(world: World) -> None:
    @settings(BOUNDED, max_examples=120)
    @given(field=st.sampled_from(FIELDS) | st.text(max_size=10), value=json_values)
    def ask(field: str, value: Any) -> None:
        check(client.post("/v1/chat/completions", json={**chat("sql", max_tokens=2), field: value}))

    with world.client() as client:
        ask()


def test_any_bytes_as_a_body(world: World) -> None:
    @settings(BOUNDED, max_examples=60)
    @given(
        body=st.binary(max_size=60),
        path=st.sampled_from(["/v1/chat/completions", "/generate", "/v1/adapters"]),
    )
    def ask(body: bytes, path: str) -> None:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        check(answer)
        assert answer.status_code == 400

    with world.client() as client:
        ask()


def test_lone_surrogates_and_control_characters(world: World) -> None:
    raw = '{"model": "sql", "max_tokens": 2, "messages": [{"role": "user", "content": "a%s"}]}'
    with world.client() as client:
        for text in ("\\ud800", "\\u0000", "\\uffff", "\\udc00\\ud800"):
            answer = client.post(
                "/v1/chat/completions",
                content=(raw % text).encode(),
                headers={"content-type": "application/json"},
            )
            check(answer)
        answer = client.post(
            "/v1/chat/completions",
            content=b'{"\\ud800": 1, "model": "\\ud800"}',
            headers={"content-type": "application/json"},
        )
        check(answer)
        assert answer.status_code == 400
