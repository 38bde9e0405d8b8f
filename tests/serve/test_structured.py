"""Answers fit the grammar that was asked for, whatever the model would rather say."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from lorakit.errors import InvalidRequestError, MissingDependencyError
from lorakit.serve.engine import Engine
from lorakit.serve.requests import Grammar
from lorakit.serve.sampling import Sampling
from lorakit.serve.structured import GrammarCompiler
from tests.serve.tiny_serving import EOS, VOCABULARY, byte_tokenizer, read, request, tiny_decoder, tiny_engine

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Any:
    with tiny_engine(tiny_decoder("llama"), running=16, step_tokens=40) as made:
        yield made


def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), VOCABULARY, {EOS})


def answers(engine: Engine, grammar: Grammar, count: int = 6) -> list[str]:
    wanted = [
        request(
            [65, 66],
            grammar=grammar,
            sampling=Sampling(seed=i, temperature=1.5),
            max_tokens=150,
            ignore_eos=False,
        )
        for i in range(count)
    ]
    streams = [engine.submit(one) for one in wanted]
    texts = []
    for stream in streams:
        tokens, finish = read(stream)
        assert (finish.reason, finish.error) == ("stop", None)
        texts.append("".join(event.text for event in tokens))
    return texts


def test_json_of_a_schema(engine: Engine) -> None:
    for text in answers(engine, Grammar("json_schema", json.dumps(SCHEMA))):
        found = json.loads(text)
        assert set(found) == {"name", "n"}
        assert 0 <= found["n"] <= 99
        assert len(found["name"]) <= 8


def test_an_expression(engine: Engine) -> None:
    for text in answers(engine, Grammar("regex", r"[a-f]{3}-(yes|no)\.")):
        assert re.fullmatch(r"[a-f]{3}-(yes|no)\.", text)


def test_one_of_several_texts(engine: Engine) -> None:
    choices = ("a.b", "a|b*", "(x)", "naïve\n")
    texts = answers(engine, Grammar("choice", choices), 12)
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def test_a_lark_grammar(engine: Engine) -> None:
    for text in answers(engine, Grammar("lark", 'start: "x" ("y" "z"){2}')):
        assert text == "xyzyz"


def test_several_answers_follow_the_grammar_each_on_its_own(engine: Engine) -> None:
    wanted = request(
        [65],
        grammar=Grammar("regex", "[ab]{4}"),
        n=4,
        sampling=Sampling(seed=1),
        max_tokens=9,
        ignore_eos=False,
    )
    texts = engine.submit(wanted).texts()
    assert all(re.fullmatch("[ab]{4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_beside_free_answers_nothing_changes(engine: Engine) -> None:
    alone = [event.token_id for event in read(engine.submit(request([65, 66, 67], max_tokens=20)))[0]]
    bound = engine.submit(request([65], grammar=Grammar("regex", "q{20}"), max_tokens=30))
    free = engine.submit(request([65, 66, 67], max_tokens=20))
    assert "".join(e.text for e in read(bound)[0]) == "q" * 20
    assert [event.token_id for event in read(free)[0]] == alone


def test_an_answer_that_is_cut_off_says_so(engine: Engine) -> None:
    _, finish = read(engine.submit(request([65], grammar=Grammar("regex", "q{20}"), max_tokens=5)))
    assert finish.reason == "length"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", "[1]"),
        Grammar("regex", "("),
        Grammar("lark", "start:: what"),
        Grammar("choice", ()),
        Grammar("choice", ("a", "")),
        Grammar("choice", "ab"),
        Grammar("regex", ("a",)),
        Grammar("regex", "a" * 300_000),
    ],
)
def test_a_grammar_that_is_none_is_refused_before_it_waits(grammar: Grammar, engine: Engine) -> None:
    with pytest.raises(InvalidRequestError):
        engine.submit(request([65], grammar=grammar))
    assert engine.state().waiting == 0


def test_compiled_grammars_are_shared_and_their_matchers_are_not() -> None:
    made = compiler()
    one, two = made.matcher(Grammar("regex", "ab")), made.matcher(Grammar("regex", "ab"))
    (first,) = one.mask().nonzero().flatten().tolist()
    one.accept(first)
    assert two.mask().nonzero().flatten().tolist() == [first]
    assert one.copy().mask().nonzero().flatten().tolist() != [first]
    assert not one.complete


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"lorakit\[structured\]"):
        compiler().matcher(Grammar("regex", "a"))


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    class Slow:
        def __len__(self) -> int:
            return 9

    with pytest.raises(InvalidRequestError, match="Slow"):
        GrammarCompiler(Slow(), 9, ()).matcher(Grammar("regex", "a"))
