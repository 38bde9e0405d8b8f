"""Many rows are rendered and tokenized together: the same tokens, labels and errors as one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import DataError
from lorakit.models import encoding
from lorakit.models.conversation import ConversationRenderer
from lorakit.train.cutting import PlainText, cut_texts
from lorakit.train.data import load_examples
from lorakit.train.data_sections import FileData
from lorakit.train.examples import Example
from lorakit.train.pairs import TextPair, load_preferences
from lorakit.train.render import IGNORED, Rendered, Renderer, render
from lorakit.train.tasks.preference import preference_rows
from lorakit.train.tasks.seq2seq import seq2seq_rows
from lorakit.train.tasks.token_classification import TaggedWords, tag_rows
from tests.tiny_chat import TEMPLATE, tiny_tokenizer, write_rows
from tests.tiny_encoder import tiny_word_tokenizer
from tests.train.test_render_properties import LLAMA_3, MISTRAL, THINKING, conversations

WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": TEMPLATE, "llama-3": LLAMA_3, "mistral": MISTRAL, "thinking": THINKING, "tools": WITH_TOOLS,
    "plain": None,
}  # fmt: skip
REFUSED = {
    ("messages", "thinking"),
    ("messages", "plain"),
    *(("messages, tools", name) for name in TEMPLATES if name != "tools"),
}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
}
FORMATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "generate": (
        [{"instruction": "Say", "input": f"x {i // 2}", "references": ["Ja!", "Si.", "Oui"]} for i in range(5)],
        {},
    ),
    "generate, with a system turn": (
        [{"instruction": "Say", "input": str(i), "references": ["Ja!", "Si."]} for i in range(4)],
        {"system": "Kurz."},
    ),
    "messages": ([{"messages": turns("a", "bé", "c", "안녕")}, {"messages": turns("a", "b")}], {"learn": "all"}),
    "messages, each answer": ([{"messages": turns("a", "b", "c", "d", "e", "f")}] * 2, {"learn": "each"}),
    "messages, an early answer": (
        [{"messages": [*turns("a", "b", "c"), {"role": "assistant", "content": "d", "loss": False}]}], {},
    ),
    "messages, tools": ([{"messages": [*turns("a"), CALL], "tools": TOOLS}, {"messages": turns("q", "z")}], {}),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"}] * 3,
        {},
    ),
    "alpaca": ([{"instruction": "a", "input": "b", "output": "c", "history": [["h", "i"]]}] * 2, {}),
    "prompt_completion": ([{"prompt": f"2+{i % 2}?", "completion": f" {i}"} for i in range(6)], {}),
    "seq2seq": ([{"source": "a b", "target": ["c", "d"]}, {"source": "a", "target": "e"}], {}),
    "text": ([{"text": "once upon"}, {"text": "a time <|im_end|>"}, {"text": "x" * 90}], {"divide": True}),
}  # fmt: skip


@pytest.fixture(params=[1, 2, 1024])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys.modules[Renderer.__module__], "_AT_ONCE", request.param)
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", request.param)
    return int(request.param)


def alone(example: Example, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids and labels from a renderer and a call of the tokenizer for each text, with nothing shared or remembered."""
    if not example.messages:
        ids = tokenizer(example.answer)["input_ids"]
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        return tuple(ids), (IGNORED, *ids[1:])

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])

    said = example.turns[: max(example.learnt_turns) + 1]
    ids = tokens(ConversationRenderer(tokenizer).answered_text(said, "e", example.tools))
    labels = [IGNORED] * len(ids)
    for turn in example.learnt_turns:
        asking = ConversationRenderer(tokenizer)
        start = len(tokens(asking.prompt_text(said[:turn], example.tools)))
        end = len(tokens(asking.answered_text(said[: turn + 1], "e", example.tools)))
        labels[start:end] = ids[start:end]
    return tuple(ids), (IGNORED, *labels[1:])


def refusal(examples: list[Example], tokenizer: Any) -> str | None:
    try:
        list(Renderer(tokenizer).rows(examples))
    except DataError as error:
        return str(error)
    return None


def content(rows: Iterator[Rendered] | tuple[Rendered, ...]) -> list[Any]:
    return [(row.id, row.ids, row.labels) for row in rows]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_rendered_together_are_those_rendered_alone(
    name: str, format: str, tmp_path: Path, at_once: int
) -> None:
    written, options = FORMATS[format]
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    data = FileData(train=write_rows(tmp_path / "d.jsonl", written), **options)
    examples = load_examples(data, "train", learning=True)
    refused = next(filter(None, (refusal([example], tokenizer) for example in examples)), None)
    # No tools without a template that shows them, and no earlier answers that the template rewrites.
    assert refusal(examples, tokenizer) == refused
    if refused is not None:
        assert "d.jsonl, line " in refused
        assert (format, name) in REFUSED
        return
    one_by_one = [Renderer(tokenizer).row(example) for example in examples]
    rows = list(Renderer(tokenizer).rows(examples))
    assert rows == one_by_one
    assert [row.example for row in rows] == examples
    assert content(iter(rows)) == [(e.id, *alone(e, tokenizer)) for e in examples]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral", "thinking"])
@settings(max_examples=25, deadline=None)
@given(drawn=st.lists(conversations(), min_size=1, max_size=6))
def test_whatever_the_conversations(name: str, drawn: list[Example]) -> None:
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    examples = (
        [replace(example, learnt=example.learnt_turns[-1:]) for example in drawn]
        if name == "thinking"
        else drawn
    )
    found = content(Renderer(tokenizer).rows(examples))
    assert found == [(e.id, *alone(e, tokenizer)) for e in examples]


def test_a_shared_prompt_is_rendered_once_and_an_equal_one_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer()
    asked: list[Any] = []
    original = ConversationRenderer.prompt_text
    monkeypatch.setattr(
        ConversationRenderer,
        "prompt_text",
        lambda self, messages, tools=(): (asked.append(messages), original(self, messages, tools))[1],
    )
    first = Example("a", tuple(turns("q")), "x")
    true, one = ({**turns("q")[0], "content": "q", "flag": flag} for flag in (True, 1))  # equal for Python
    examples = [
        first,
        replace(first, answer="y"),
        replace(first, messages=(true,)),
        replace(first, messages=(one,)),
    ]
    assert len(list(Renderer(tokenizer).rows(examples))) == 4
    assert len(asked) == 3


def test_the_first_wrong_row_is_named_whatever_is_wrong_with_later_ones(at_once: int) -> None:
    template = (
        TEMPLATE + "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = "<|endoftext|>"
    fine = Example("a", tuple(turns("q")), "x", place="f, line 1")
    unlearnt = Example("b", tuple(turns("q")), "x", learnt=(), place="f, line 2")
    refused = Example("c", tuple(turns("no")), "x", place="f, line 3")
    for order, line in (((fine, unlearnt, refused), 2), ((fine, refused, unlearnt), 3)):
        with pytest.raises(DataError, match=f"^f, line {line}: "):
            render(order, tokenizer, max_length=99)


def test_preferences(tmp_path: Path, at_once: int) -> None:
    written = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": turns("a", "b", "c"), "chosen": "d" * 30, "rejected": "e"},
        {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
    ]
    tokenizer = tiny_tokenizer()
    pairs = load_preferences(FileData(train=write_rows(tmp_path / "d.jsonl", written)), "train")
    rows = preference_rows(pairs, tokenizer, max_length=999, overlong="error").rows
    found = [((row.chosen.ids, row.chosen.labels), (row.rejected.ids, row.rejected.labels)) for row in rows]
    assert found == [tuple(alone(example, tokenizer) for example in pair.examples) for pair in pairs]


WORDS = ["the old cat", "dog", "a red oak is very old and blue", "green elm", "of"]


@pytest.mark.parametrize(
    "seconds", [[None] * 5, ["cow", "the fir", "a", "very old", "is"], [None, "a", "b", None, ""]]
)
def test_texts_to_classify(seconds: list[str | None], at_once: int) -> None:
    tokenizer = tiny_word_tokenizer()
    texts = [
        PlainText(f"line {i}", text, two) for i, (text, two) in enumerate(zip(WORDS, seconds, strict=True))
    ]
    cut = cut_texts(texts, tokenizer, max_length=6, overlong="truncate")
    for (kept, encoded), text in zip(cut.kept, texts, strict=True):
        expected = tokenizer(text.text, text.second, truncation=True, max_length=6)
        assert kept is text
        assert (list(encoded.ids), list(encoded.types or ())) == (
            expected["input_ids"],
            expected["token_type_ids"],
        )
    lengths = [len(tokenizer(text.text, text.second)["input_ids"]) for text in texts]
    assert (cut.longest, cut.truncated) == (max(lengths), sum(length > 6 for length in lengths))


def test_sources_and_targets(at_once: int) -> None:
    tokenizer = tiny_tokenizer(None)
    examples = [TextPair(str(i), "", text, text[::-1], ()) for i, text in enumerate(WORDS)]
    rows = seq2seq_rows(examples, tokenizer, max_length=12, overlong="truncate").rows
    end = tokenizer.eos_token_id
    for row, example in zip(rows, examples, strict=True):
        source = tokenizer(example.source)["input_ids"]
        target = [*tokenizer(text_target=example.target)["input_ids"], end]
        assert list(row.ids) == (source if len(source) <= 12 else [*source[:11], source[-1]])
        assert list(row.labels) == target[:12]


def test_tagged_words(at_once: int) -> None:
    tokenizer = tiny_word_tokenizer()
    texts = [TaggedWords(f"line {i}", tuple(t.split()), ("O",) * len(t.split())) for i, t in enumerate(WORDS)]
    rows = tag_rows(texts, ("O", "B-x"), tokenizer, max_length=7, overlong="truncate").rows
    for row, text in zip(rows, texts, strict=True):
        expected = tokenizer(list(text.words), is_split_into_words=True, truncation=True, max_length=7)
        words = expected.word_ids()
        assert list(row.ids) == expected["input_ids"]
        assert list(row.labels) == [IGNORED if word is None else 0 for word in words]


@pytest.mark.parametrize("most", [1, 2, 7])
def test_portions_hold_everything_in_order_and_no_more_than_they_may(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", most)
    monkeypatch.setattr(encoding, "_CHARACTERS_AT_ONCE", 10)
    texts = ["a" * n for n in (3, 4, 5, 30, 0, 0, 0, 10, 1, 2)]
    found = [list(some) for some in encoding.portions(texts, [len(text) for text in texts])]
    assert [text for some in found for text in some] == texts
    assert all(len(some) <= most and (len(some) == 1 or sum(map(len, some)) <= 10) for some in found)
    assert list(encoding.portions([], [])) == []
