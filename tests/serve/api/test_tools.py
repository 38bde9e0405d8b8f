"""Tools in chats: shown by the template, called by models that have learnt to, forced, streamed, and sent back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import lorakit as lk
from lorakit.models.chat_template import save_template
from lorakit.models.conversation import ConversationRenderer
from lorakit.serve.api.schemas.chat import ChatRequest
from lorakit.serve.api.tools import Message, tool_use
from lorakit.serve.requests import TokenEvent
from tests.serve.api.test_chat import streamed
from tests.serve.http_world import BASE, Running, World, chat, error_of
from tests.tiny_chat import TEMPLATE, save_tiny_chat, tiny_model, tiny_tokenizer

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHOWN = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
HERMES_TEMPLATE = _SHOWN + _TURNS.replace("call>", "tool_call>")
LLAMA_TEMPLATE = _SHOWN + '{# {"name": function name, "parameters": dictionary #}' + _TURNS
MISTRAL_TEMPLATE = _SHOWN + "{# [TOOL_CALLS] #}" + _TURNS
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "how": {"enum": ["up", "down"]}},
    "required": ["a", "how"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "round_it", "description": "d", "parameters": PARAMETERS, "strict": True},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '{"name": "round_it", "arguments": {"a": 3, "how": "up"}}'
ANSWERS = {
    "one": f"<tool_call>\n{CALL}\n</tool_call>",
    "two": f'Wait.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "now"}}\n</tool_call>',
}


def learnt(folder: Path, answer: str) -> None:
    """An adapter that answers "hello" with a certain text when it is shown the tools."""
    model, tokenizer = tiny_model(), tiny_tokenizer(HERMES_TEMPLATE)
    shown = [{**TOOLS[0], "function": {**TOOLS[0]["function"]}}, TOOLS[1]]
    shown[0]["function"].pop("strict")
    prompt = ConversationRenderer(tokenizer).prompt([{"role": "user", "content": "hello"}], shown)
    ids = torch.tensor([[*prompt, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    lk.attach(model, lk.LoRA(r=16, alpha=32), targets="all-linear", name="a")
    optimizer = torch.optim.Adam(lk.trainable(model).values(), lr=5e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    lk.save(model, folder, name="a")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tools")
    save_tiny_chat(folder / BASE)
    tiny_tokenizer(HERMES_TEMPLATE).save_pretrained(folder / BASE)
    for name, answer in ANSWERS.items():
        learnt(folder / "adapters" / name, answer)
    for name, template in (("llama", LLAMA_TEMPLATE), ("mistral", MISTRAL_TEMPLATE), ("bare", TEMPLATE)):
        learnt(folder / "adapters" / name, "x")
        save_template(folder / "adapters" / name, tiny_tokenizer(template))
    with Running(folder) as running:
        yield running


def ask(world: World, model: str, **more: Any) -> dict[str, Any]:
    answer = world.post("/v1/chat/completions", chat(model, **{"tools": TOOLS, "max_tokens": 300, **more}))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    for call in choice["message"].get("tool_calls", ()):
        assert (call["type"], len(call["id"])) == ("function", 9)
    return dict(choice)


def called(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_a_call_that_the_model_makes_itself(world: World) -> None:
    choice = ask(world, "one")
    assert called(choice) == [("round_it", {"a": 3, "how": "up"})]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None


def test_text_and_two_calls(world: World) -> None:
    choice = ask(world, "two")
    assert choice["message"]["content"] == "Wait."
    assert called(choice) == [("round_it", {"a": 3, "how": "up"}), ("now", {})]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    assert called(ask(world, "two", parallel_tool_calls=False)) == [("round_it", {"a": 3, "how": "up"})]


def test_a_call_that_is_cut_off_is_text(world: World) -> None:
    choice = ask(world, "one", max_tokens=20)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ANSWERS["one"][:20]
    assert "tool_calls" not in choice["message"]


def test_streams_tell_the_same(world: World) -> None:
    for logprobs in (None, True):
        events = streamed(world, chat("two", tools=TOOLS, max_tokens=300, logprobs=logprobs))
        choices = [event["choices"][0] for event in events]
        assert "".join(c["delta"].get("content") or "" for c in choices) == "Wait."
        calls = [call for c in choices for call in c["delta"].get("tool_calls", [])]
        assert [call["index"] for call in calls] == [0, 1]
        assert [call["function"]["name"] for call in calls] == ["round_it", "now"]
        assert choices[-1]["finish_reason"] == "tool_calls"
        if logprobs:
            told = [t["token"] for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
            assert "".join(told).startswith(ANSWERS["two"])


def test_without_tools_the_same_answer_is_text(world: World) -> None:
    answer = world.post("/v1/chat/completions", chat("one", max_tokens=300)).json()["choices"][0]
    assert "tool_calls" not in answer["message"]
    untold = ask(world, "one", tool_choice="none")
    assert untold["message"]["content"] == answer["message"]["content"]  # and the template shows no tools


@pytest.mark.parametrize("model", [BASE, "llama", "mistral"])
def test_forced_calls_fit_the_schema(world: World, model: str) -> None:
    for seed in range(3):
        choice = ask(
            world,
            model,
            tool_choice={"type": "function", "function": {"name": "round_it"}},
            temperature=1.0,
            seed=seed,
        )
        assert choice["finish_reason"] == "stop"
        ((name, arguments),) = called(choice)
        assert name == "round_it"
        assert set(arguments) == {"a", "how"}
        assert arguments["a"] in range(10)
        assert arguments["how"] in ("up", "down")
    choice = ask(world, model, tools=TOOLS[:1], tool_choice="required", temperature=1.0, seed=5)
    assert choice["finish_reason"] == "tool_calls"
    assert [name for name, _ in called(choice)] == ["round_it"]
    assert choice["message"]["content"] is None


def test_required_lets_the_model_choose(world: World) -> None:
    now = [
        {"type": "function", "function": {"name": n, "parameters": {"additionalProperties": False}}}
        for n in "ab"
    ]
    body = {"tools": now, "tool_choice": "required", "temperature": 2.0, "max_tokens": 60}
    names = {called(ask(world, BASE, seed=seed, **body))[0][0] for seed in range(12)}
    assert names == {"a", "b"}


def test_the_conversation_goes_on(world: World) -> None:
    """The `openai` package's own objects are sent back as they came."""
    client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    first = client.chat.completions.create(
        model="one",
        messages=messages,
        tools=TOOLS,
        temperature=0,
        max_tokens=300,  # type: ignore[arg-type]
    )
    message = first.choices[0].message
    assert message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"}]
    second = client.chat.completions.create(
        model="one",
        messages=messages,
        tools=TOOLS,
        temperature=0,
        max_tokens=5,  # type: ignore[arg-type]
    )
    turns = [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": json.loads(CALL)}],
        },
        {"role": "tool", "content": "4"},
    ]
    shown = json.loads(json.dumps(TOOLS))
    shown[0]["function"].pop("strict")
    rendered = ConversationRenderer(tiny_tokenizer(HERMES_TEMPLATE)).prompt(turns, shown)
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(rendered)


def test_many_answers_each_with_calls(world: World) -> None:
    body = chat("one", tools=TOOLS, max_tokens=300, n=2)
    choices = world.post("/v1/chat/completions", body).json()["choices"]
    assert [called(choice) for choice in choices] == 2 * [[("round_it", {"a": 3, "how": "up"})]]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages.0"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_mistakes(world: World, change: dict[str, Any], param: str) -> None:
    answer = world.post("/v1/chat/completions", {**chat("one", tools=TOOLS), **change})
    found = error_of(answer)
    assert found[:3] == (400, "invalid_request_error", "invalid_request")
    assert str(found[3]).startswith(param)


def test_a_template_that_shows_no_tools(world: World) -> None:
    answer = world.post("/v1/chat/completions", chat("bare", tools=TOOLS))
    assert error_of(answer)[::3] == (400, "tools")
    assert "does not show them" in answer.json()["error"]["message"]
    assert (
        world.post("/v1/chat/completions", chat("bare", tools=TOOLS, tool_choice="none")).status_code == 200
    )


def test_marks_that_are_special_tokens_count() -> None:
    tokenizer = tiny_tokenizer(MISTRAL_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<other>"]})
    mark, arguments = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"])
    asked = ChatRequest.model_validate({**chat("one"), "tools": TOOLS})
    use = tool_use(ConversationRenderer(tokenizer), asked)
    assert use is not None
    assert use.marks == {mark: "[TOOL_CALLS]", arguments: "[ARGS]"}
    message = Message(use)
    for token, text in ((mark, ""), (5, "now"), (arguments, ""), (6, "{"), (7, "}")):
        assert message.add(TokenEvent(0, token, text)) == []
    (delta,) = message.finish()
    assert delta["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
