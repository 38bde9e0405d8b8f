"""Scoring a base model and an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, evaluate, train
from tests.tiny_chat import colour_rows, write_rows

MakeRecipe = Callable[..., Recipe]


def scored(recipe: MakeRecipe, **sections: object) -> Recipe:
    return recipe(
        max_steps=80,
        lr=1e-2,
        batch_rows=8,
        sections={
            "generate": {"max_new_tokens": 8},
            "evaluate": {"metrics": ["exact_match", "loss"]},
            **sections,
        },
    )


def test_an_adapter_scores_better_than_its_base_and_alike_however_it_is_given(recipe: MakeRecipe) -> None:
    made = scored(recipe)
    result = train(made)
    base = evaluate(made)
    adapted = evaluate(made, adapter=result.adapter)
    here = evaluate(made, model=result.model, tokenizer=result.tokenizer)
    assert base.scores["exact_match"] == 0
    assert adapted.scores["exact_match"] > 0.5
    assert adapted.scores["loss"] < base.scores["loss"]
    assert adapted.scores["perplexity"] == pytest.approx(math.exp(adapted.scores["loss"]))
    assert here.scores == pytest.approx(adapted.scores, rel=1e-5)
    assert here.answers == adapted.answers
    with lk.use(result.model, None):
        assert evaluate(made, model=result.model, tokenizer=result.tokenizer).answers == base.answers


def test_an_adapter_beside_others_on_a_loaded_model_and_gone_afterwards(recipe: MakeRecipe) -> None:
    made = scored(recipe)
    result = train(made)
    before = lk.report(result.model)
    other = evaluate(made, adapter=result.adapter, model=result.model, tokenizer=result.tokenizer)
    assert other.answers == evaluate(made, adapter=result.adapter).answers
    assert lk.report(result.model) == before


def test_limit_and_progress(recipe: MakeRecipe) -> None:
    from lorakit.train import Silent

    class Listening(Silent):
        def __init__(self) -> None:
            self.heard: list[tuple[int, int, str]] = []

        def answered(self, done: int, total: int, what: str) -> None:
            self.heard.append((done, total, what))

    listening = Listening()
    made = recipe(
        sections={
            "adapter": {"r": 8, "alpha": 16},
            "generate": {"max_new_tokens": 2, "batch_rows": 2},
            "evaluate": {"limit": 5},
        }
    )
    result = evaluate(made, limit=3, progress=listening, title="asking")
    assert result.count == len(result.answers) == 3
    assert listening.heard[0] == (2, 3, "asking")
    assert evaluate(made).count == 5


def test_metrics_fit_the_data(recipe: MakeRecipe, tmp_path: Path) -> None:
    def names(rows: list[object]) -> set[str]:
        file = str(write_rows(tmp_path / "t.jsonl", rows))
        made = recipe(sections={"data": {"test": file}, "generate": {"max_new_tokens": 2}})
        return set(evaluate(made).scores)

    assert names(list(colour_rows(2))) == {"exact_match", "bleu"}
    row = {"instruction": "i", "input": "", "references": ["a b c d", "b c d e"]}
    assert names([row]) == {"bleu", "nist", "nist_row_lengths"}
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert names([talk]) == {"loss", "perplexity"}
    made = recipe(sections={"data": {"builtin": "text_to_sql", "test": 2}, "generate": {"max_new_tokens": 2}})
    result = evaluate(made)
    assert set(result.scores) == {"execution_accuracy", "failed_to_run", "exact_match"}
    assert [answer.correct for answer in result.answers] == [False, False]
    assert all(answer.error for answer in result.answers)


def test_what_cannot_be_scored(recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="execution_accuracy needs databases"):
        evaluate(recipe(sections={"evaluate": {"metrics": ["execution_accuracy"]}}))
    with pytest.raises(ConfigError, match=r"no file for the valid split"):
        evaluate(recipe(), split="valid")
    with pytest.raises(AdapterFileError, match="There is no adapter"):
        evaluate(recipe(), adapter=tmp_path / "nowhere")


def test_the_right_answers_score_full_marks(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.tasks import text_to_sql
    from lorakit.train.tasks import causal_lm

    gold = [f"Sure:\n```sql\n{e.sql};\n```" for e in text_to_sql.generate("test", 4)]
    monkeypatch.setattr(causal_lm, "generate", lambda *args, **kwargs: gold)
    made = recipe(sections={"data": {"builtin": "text_to_sql", "test": 4}})
    model = load_model(made.model.name)
    result = evaluate(made, model=model, tokenizer=load_tokenizer(made.model.name))
    assert result.scores["execution_accuracy"] == 1.0
    assert result.scores["failed_to_run"] == 0.0
    assert result.scores["exact_match"] == 0.0
