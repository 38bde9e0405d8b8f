"""Rendering, whatever the conversation: training fits generation, and exactly the chosen answers are learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import DataError
from lorakit.models.conversation import ConversationRenderer
from lorakit.train.examples import Example
from lorakit.train.render import IGNORED, Rendered, Renderer, render
from tests.tiny_chat import TEMPLATE, tiny_tokenizer

LLAMA_3 = (
    "{{ '<|endoftext|>' }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
THINKING = TEMPLATE.replace(  # as Qwen3: earlier thoughts are left out, the last answer gets an empty one
    "{{ m['content'] }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
TEMPLATES = {"chatml": TEMPLATE, "llama-3": LLAMA_3, "mistral": MISTRAL, "plain": None}

texts = (
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<|"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """Alternating turns, perhaps after a system turn, with any of the answers learnt."""
    turns = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    answers = []
    for _ in range(draw(st.integers(1, 4))):
        turns.append({"role": "user", "content": draw(texts)})
        answers.append(len(turns))
        turns.append({"role": "assistant", "content": draw(texts)})
    learnt = draw(st.lists(st.sampled_from(answers), min_size=1, unique=True).map(sorted))
    return Example("e", tuple(turns[:-1]), turns[-1]["content"], learnt=tuple(learnt))


def learnt_runs(row: Rendered) -> list[tuple[int, list[int]]]:
    """Where each run of learnt tokens begins, and its tokens."""
    runs: list[tuple[int, list[int]]] = []
    for i, label in enumerate(row.labels):
        if label == IGNORED:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == i:
            runs[-1][1].append(label)
        else:
            runs.append((i, [label]))
    return runs


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral"])
@settings(max_examples=60, deadline=None)
@given(example=conversations())
def test_each_learnt_answer_follows_its_prompt_and_ends_in_the_stop_token(
    name: str, example: Example
) -> None:
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    row = Renderer(tokenizer).row(example)
    asking = ConversationRenderer(tokenizer)
    runs = learnt_runs(row)
    assert len(runs) == len(example.learnt_turns)
    for (start, tokens), turn in zip(runs, example.learnt_turns, strict=True):
        prompt = asking.prompt(example.turns[:turn])
        assert list(row.ids[:start]) == prompt  # what the model is asked with when it serves
        assert tokenizer.decode(tokens).strip() == f"{example.turns[turn]['content']}<|im_end|>"
        assert list(row.ids[start : start + len(tokens)]) == tokens
    assert row.labels[0] == IGNORED
    assert row.labels[-1] == row.ids[-1] == tokenizer.eos_token_id


@settings(max_examples=30, deadline=None)
@given(example=conversations())
def test_without_a_template_the_last_answer_ends_the_text(example: Example) -> None:
    tokenizer = tiny_tokenizer(None)
    last = replace(example, learnt=(len(example.messages),))
    row = Renderer(tokenizer).row(last)
    prompt = ConversationRenderer(tokenizer).prompt(last.messages)
    assert list(row.ids[: len(prompt)]) == prompt
    ((start, tokens),) = learnt_runs(row)
    assert start == len(prompt)
    assert tokenizer.decode(tokens) == f"{example.answer}<|im_end|>"


@settings(max_examples=30, deadline=None)
@given(example=conversations())
def test_a_template_that_rewrites_earlier_answers_is_refused_or_learnt_right(example: Example) -> None:
    tokenizer = tiny_tokenizer(THINKING)
    renderer = Renderer(tokenizer)
    last = len(example.messages)
    row = renderer.row(replace(example, learnt=(last,)))
    ((start, tokens),) = learnt_runs(row)
    assert list(row.ids[:start]) == renderer.prompt(example.messages)
    assert tokenizer.decode(tokens) == f"<think>\n\n</think>\n\n{example.answer}<|im_end|>"
    if len(example.learnt_turns) > 1:
        with pytest.raises(DataError, match=r"set data\.learn to last, or to each"):
            renderer.row(example)


@settings(max_examples=40, deadline=None)
@given(examples=st.lists(conversations(), min_size=1, max_size=5), most=st.integers(2, 120))
def test_cutting_never_changes_what_is_kept(examples: list[Example], most: int) -> None:
    tokenizer = tiny_tokenizer()
    whole = [Renderer(tokenizer).row(example) for example in examples]
    if not all(any(label != IGNORED for label in row.labels[:most]) for row in whole):
        with pytest.raises(DataError, match="nothing left to learn"):
            render(examples, tokenizer, max_length=most, overlong="truncate")
        return
    cut = render(examples, tokenizer, max_length=most, overlong="truncate")
    assert cut.truncated == sum(len(row.ids) > most for row in whole)
    assert cut.lost == sum(max(0, len(row.ids) - most) for row in whole)
    for kept, row in zip(cut.rows, whole, strict=True):
        assert kept.ids == row.ids[:most]
        assert kept.labels == row.labels[:most]
        assert kept.learnt


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<|"), min_size=1, max_size=80),
    most=st.integers(2, 30),
)
def test_divided_texts_are_whole_together(text: str, most: int) -> None:
    tokenizer = tiny_tokenizer()
    (ids,) = [Renderer(tokenizer).row(Example("t", (), text)).ids]
    found = render([Example("t", (), text, divide=True)], tokenizer, max_length=most)
    joined = [token for row in found.rows for token in row.ids]
    assert joined == list(ids[: len(joined)])
    assert len(ids) - len(joined) <= 1  # a last piece of one token teaches nothing
    assert all(len(row.ids) <= most and row.labels == (IGNORED, *row.ids[1:]) for row in found.rows)
    assert found.divided == (len(ids) > most)
