"""Rendering: what is asked in training is what is asked in generation, and only answers are learnt."""

from __future__ import annotations

import pytest

from lorakit.errors import DataError
from lorakit.train.examples import Example
from lorakit.train.render import IGNORED, Rendered, Renderer, render
from tests.tiny_chat import TEMPLATE, tiny_tokenizer

ASKED = Example("e", ({"role": "system", "content": "S"}, {"role": "user", "content": "Hé?"}), "Ja!")
TALK = Example(
    "t",
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
    ),
    "ef",
    learn_all=True,
)


def learnt(row: Rendered) -> str:
    return str(tiny_tokenizer().decode([label for label in row.labels if label != IGNORED]))


def test_answer_and_stop_token_are_learnt_though_pad_is_the_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    row = Renderer(tokenizer).row(ASKED)
    assert tokenizer.decode(row.ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\nJa!<|im_end|>"
    )
    assert learnt(row) == "Ja!<|im_end|>"
    assert row.labels[-1] == tokenizer.pad_token_id
    assert row.learnt == 4


def test_prompt_for_generation_is_the_beginning_of_the_row() -> None:
    renderer = Renderer(tiny_tokenizer())
    prompt, row = renderer.prompt(ASKED.messages), renderer.row(ASKED)
    assert list(row.ids[: len(prompt)]) == prompt
    assert all(label == IGNORED for label in row.labels[: len(prompt)])
    assert all(label != IGNORED for label in row.labels[len(prompt) :])


def test_every_answer_of_a_conversation_or_the_last() -> None:
    from dataclasses import replace

    renderer = Renderer(tiny_tokenizer())
    assert learnt(renderer.row(TALK)) == "bc<|im_end|>ef<|im_end|>"
    assert learnt(renderer.row(replace(TALK, learn_all=False))) == "ef<|im_end|>"


def test_another_end_of_turn_than_the_eos_token() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.eos_token = "<|endoftext|>"
    assert learnt(Renderer(tokenizer).row(ASKED)) == "Ja!<|im_end|>"


def test_template_without_an_end_of_turn_gets_the_eos_token() -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    assert learnt(Renderer(tiny_tokenizer(template)).row(ASKED)) == "Ja!<|im_end|>"


def test_template_that_renders_the_prompt_otherwise_with_an_answer_is_refused() -> None:
    template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match="does not begin with the prompt"):
        Renderer(tiny_tokenizer(template)).row(ASKED)


def test_tokens_that_change_at_the_border_are_refused() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # ":" and "x" merge to one token, so the prompt's last token is another one once the answer follows.
    tokens = Tokenizer(BPE(vocab={"<e>": 0, ":": 1, "x": 2, ":x": 3, "q": 4}, merges=[(":", "x")]))
    tokens.add_special_tokens(["<e>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        eos_token="<e>",
        pad_token="<e>",
        chat_template="{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else '<e>' }}{% endfor %}",
    )
    with pytest.raises(
        DataError,
        match=r"tokens of 'e' change where the answer begins or ends.*':' alone, but ':x' in the whole",
    ):
        Renderer(tokenizer).row(Example("e", ({"role": "user", "content": "q"},), "x"))


def test_without_a_template_the_text_is_plain() -> None:
    tokenizer = tiny_tokenizer(None)
    row = Renderer(tokenizer).row(ASKED)
    assert tokenizer.decode(row.ids) == "S\nHé?\nJa!<|im_end|>"
    assert learnt(row) == "Ja!<|im_end|>"


EXAMPLES = [Example(str(i), ({"role": "user", "content": "q"},), "a" * i) for i in (1, 5, 30)]


def lengths(max_length: int, overlong: str) -> tuple[list[int], int, int, int]:
    rows = render(EXAMPLES, tiny_tokenizer(), max_length=max_length, overlong=overlong)  # type: ignore[arg-type]
    return [len(row.ids) for row in rows.rows], rows.longest, rows.truncated, rows.dropped


def test_long_rows_are_left_out_cut_or_refused_and_counted() -> None:
    short = len(Renderer(tiny_tokenizer()).row(EXAMPLES[0]).ids)
    assert lengths(100, "drop") == ([short, short + 4, short + 29], short + 29, 0, 0)
    assert lengths(short + 5, "drop") == ([short, short + 4], short + 29, 0, 1)
    assert lengths(short + 5, "truncate") == ([short, short + 4, short + 5], short + 29, 1, 0)
    with pytest.raises(DataError, match=r"1 rows are longer than train\.max_length: 30"):
        lengths(short + 5, "error")


def test_rows_with_nothing_to_learn_are_refused() -> None:
    with pytest.raises(DataError, match="3 rows have nothing left to learn: 1, 5, 30"):
        lengths(8, "truncate")
    with pytest.raises(DataError, match="No row is left to learn: all 3 are too long"):
        lengths(8, "drop")


def test_summary_says_what_was_done() -> None:
    short = len(Renderer(tiny_tokenizer()).row(EXAMPLES[0]).ids)
    text = str(render(EXAMPLES, tiny_tokenizer(), max_length=short + 5))
    assert "2 rows" in text
    assert "1 longer rows left out" in text
    assert f"longest {short + 29}" in text


# ---- what is refused
def test_an_answer_without_a_token_that_stops_is_refused() -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"ends in '!' and not in a token that stops.*eos_token"):
        Renderer(tokenizer).row(ASKED)


def test_a_doubled_beginning_is_refused_and_a_single_one_is_not() -> None:
    tokenizer = tiny_tokenizer("<|endoftext|>" + TEMPLATE)
    tokenizer.bos_token = "<|endoftext|>"
    row = Renderer(tokenizer).row(ASKED)
    assert row.ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "<|endoftext|><|endoftext|>" + TEMPLATE
    with pytest.raises(DataError, match=r"begins with '<\|endoftext\|>' twice"):
        Renderer(tokenizer).row(ASKED)


def test_the_place_of_a_bad_row_is_told() -> None:
    from dataclasses import replace

    bad = replace(ASKED, place="train.jsonl, line 7", learnt=())
    with pytest.raises(DataError, match=r"^train\.jsonl, line 7: Nothing of 'e' would be learnt"):
        Renderer(tiny_tokenizer()).row(bad)


def test_turns_after_the_last_learnt_answer_are_not_read() -> None:
    from dataclasses import replace

    row = Renderer(tiny_tokenizer()).row(replace(TALK, learnt=(1,)))
    assert str(tiny_tokenizer().decode(row.ids)).endswith("bc<|im_end|>")


# ---- plain texts
def test_a_plain_text_is_learnt_whole_but_for_its_first_token() -> None:
    tokenizer = tiny_tokenizer()
    row = Renderer(tokenizer).row(Example("t", (), "Once."))
    assert tokenizer.decode(row.ids) == "Once.<|im_end|>"
    assert row.labels == (IGNORED, *row.ids[1:])


def test_a_long_text_is_divided_or_treated_as_other_rows() -> None:
    text = Example("t", (), "abcdefghi", divide=True)  # ten tokens with the end
    divided = render([text], tiny_tokenizer(), max_length=4)
    assert [len(row.ids) for row in divided.rows] == [4, 4, 2]
    assert (divided.divided, divided.dropped, divided.lost) == (1, 0, 0)
    assert "1 longer texts divided" in str(divided)
    whole = Example("t", (), "abcdefghi")
    assert len(render([whole], tiny_tokenizer(), max_length=4, overlong="truncate").rows[0].ids) == 4
    with pytest.raises(DataError, match="No row is left"):
        render([whole], tiny_tokenizer(), max_length=4)


def test_a_text_of_one_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="Nothing of 't' would be learnt"):
        Renderer(tokenizer).row(Example("t", (), "a"))
