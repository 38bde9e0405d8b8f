"""Conversations as text and tokens: prompts, tools, what a template writes by itself, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.models.conversation import ConversationRenderer, normalised, stop_id, stop_ids
from tests.tiny_chat import TEMPLATE, tiny_model, tiny_tokenizer

ASKED = [{"role": "user", "content": "a"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer(template: str | None = TEMPLATE) -> ConversationRenderer:
    return ConversationRenderer(tiny_tokenizer(template))


def test_the_prompt_is_what_transformers_would_ask_with() -> None:
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ConversationRenderer(tokenizer).prompt(ASKED) == expected


def test_tools_stand_in_the_prompt_and_calls_are_learnt_as_the_template_writes_them() -> None:
    chat = renderer(WITH_TOOLS)
    assert chat.prompt_text(ASKED, TOOLS).startswith('<|im_start|>tools\n[{"type": "function"')
    (call,) = normalised(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            }
        ]
    )
    text = chat.answered_text([*ASKED, call], "r", TOOLS)
    assert text.removeprefix(chat.prompt_text(ASKED, TOOLS)) == '<call>{"x": 1}</call><|im_end|>'


def test_a_template_that_shows_no_tools_is_refused() -> None:
    with pytest.raises(DataError, match="does not show them"):
        renderer().prompt(ASKED, TOOLS)
    with pytest.raises(DataError, match="Tools need a chat template"):
        renderer(None).prompt([*ASKED, {"role": "tool", "content": "x"}])
    with pytest.raises(DataError, match="Tools need a chat template"):
        renderer(None).prompt(ASKED, TOOLS)


def test_what_the_template_writes_before_the_answer_is_part_of_it() -> None:
    thinking = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
    )
    chat = renderer(thinking)
    text = chat.answered_text(ANSWERED, "r")
    assert text.removeprefix(chat.prompt_text(ASKED)) == "<think>\n\n</think>\n\nb<|im_end|>"
    dotted = [*ASKED, {"role": "assistant", "content": "b."}]
    assert chat.answered_text(dotted, "r").endswith("b.<|im_end|>")


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    silent = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}")
    with pytest.raises(DataError, match="leaves the answer of 'r' out"):
        renderer(silent).answered_text(ANSWERED, "r")


def test_a_template_that_refuses_or_is_wrong_is_told_in_its_own_words() -> None:
    refusing = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: Roles must alternate"):
        renderer(refusing).prompt(ASKED)
    with pytest.raises(ConfigError, match="chat template, line 2: "):
        renderer("\n{% if %}").prompt(ASKED)


def test_plain_texts_get_the_end_token_once() -> None:
    tokenizer = tiny_tokenizer()
    chat = ConversationRenderer(tokenizer)
    assert tokenizer.decode(chat.plain_ids("ab")) == "ab<|im_end|>"
    assert chat.plain_ids("ab<|im_end|>") == chat.plain_ids("ab")


def test_stop_tokens_are_the_templates_and_the_makers() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model()
    model.generation_config.eos_token_id = [0, 2]
    assert stop_id(tokenizer) == 2
    assert stop_ids(model, tokenizer) == [0, 2]


@pytest.mark.parametrize("turns", [None, [], "abc", [3], [{"role": "user"}], [{"content": "a"}]])
def test_what_is_no_conversation(turns: Any) -> None:
    with pytest.raises(DataError):
        normalised(turns)


def test_normalising_keeps_what_templates_read_and_changes_nothing_in_place() -> None:
    turn = {"role": "tool", "content": "x", "name": "f", "tool_call_id": "1"}
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    given = [turn, {"role": "assistant", "content": None, "tool_calls": [call]}]
    kept, called = normalised(given)
    assert kept == turn
    assert called["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}
    ]
    assert call["function"]["arguments"] == "{}"
    assert normalised(normalised(given)) == normalised(given)
