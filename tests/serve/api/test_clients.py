"""Clients that others wrote: the `openai` package in all its ways, and `curl`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import openai
import pytest

from tests.serve.http_world import BASE, World, chat

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(world: World) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{world.url}/v1", api_key="unused", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {BASE, "sql", "style", "acme-secret"}
    assert client.models.retrieve("sql").id == "sql"


def test_chat(client: openai.OpenAI, world: World) -> None:
    answer = client.chat.completions.create(
        model="sql",
        messages=ASKED,
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
        n=1,
    )
    assert answer.choices[0].message.content == world.ask("sql")
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 12
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer._request_id


def test_fields_of_ours_go_in_the_extra_body(client: openai.OpenAI, world: World) -> None:
    extra = {"top_k": 1, "repetition_penalty": 1.0, "min_p": 0.0}
    answer = client.chat.completions.create(
        model="style", messages=ASKED, temperature=2, max_tokens=12, extra_body=extra
    )
    assert answer.choices[0].message.content == world.ask("style")


def test_chat_stream(client: openai.OpenAI, world: World) -> None:
    stream = client.chat.completions.create(
        model="sql",
        messages=ASKED,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == world.ask("sql")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_leaving_a_stream_frees_its_request(client: openai.OpenAI, world: World) -> None:
    body = {"ignore_eos": True}
    with client.chat.completions.create(
        model="sql", messages=ASKED, max_tokens=900, stream=True, extra_body=body
    ) as stream:
        next(iter(stream))
    world.idle()
    assert world.server.store.entry("sql").in_use == 0


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="sql", prompt=["a", "b"], max_tokens=6, temperature=0, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1]
    stream = client.completions.create(model="sql", prompt="a", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_parsed_answers(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Colour(BaseModel):
        red: bool

    answer = client.chat.completions.parse(
        model="sql", messages=ASKED, response_format=Colour, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_many_adapters_at_once(world: World) -> None:
    models = [BASE, "sql", "style", "sql:0.5+style:0.5"] * 5
    alone = {model: world.ask(model, max_tokens=30) for model in models}

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="unused") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=m, messages=ASKED, temperature=0, max_tokens=30)
                    for m in models
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == [alone[model] for model in models]


def test_async_stream(world: World) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="unused") as client:
            stream = await client.chat.completions.create(
                model="style", messages=ASKED, temperature=0, max_tokens=12, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == world.ask("style")


def test_errors_become_the_packages_own(client: openai.OpenAI, world: World) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=ASKED)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="sql", messages=ASKED, extra_body={"surprise": 1})


def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, world: World) -> None:
    stream = client.chat.completions.create(
        model="style", messages=ASKED, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with world.client() as other:
        other.delete("/v1/adapters/style?force=true")
    with pytest.raises(openai.APIError, match="unloaded by force"):
        list(stream)
    world.post("/v1/adapters", {"name": "style"})


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(world: World) -> None:
    words = [
        "curl",
        "-sS",
        "--noproxy",
        "*",
        f"{world.url}/v1/chat/completions",
        "-H",
        "content-type: application/json",
    ]
    body = json.dumps(chat("sql"))
    outcome = subprocess.run([*words, "-d", body], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(outcome.stdout)["choices"][0]["message"]["content"] == world.ask("sql")
    streamed = json.dumps({**chat("sql"), "stream": True})
    outcome = subprocess.run(
        [*words, "-N", "-d", streamed], capture_output=True, text=True, timeout=60, check=True
    )
    assert outcome.stdout.endswith("data: [DONE]\n\n")
