"""T5 and BART learn to write one text from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, DataError, RecipeError
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, evaluate, train
from lorakit.train.collate import PaddedCollator
from lorakit.train.generation import generate_from_sources
from lorakit.train.pairs import TextPair
from lorakit.train.recipe import GenerateSection
from lorakit.train.tasks import task_of
from lorakit.train.tasks.seq2seq import seq2seq_rows
from tests.tiny_chat import colour_rows
from tests.train.test_trainer import assert_resumes

MakeTask = Callable[..., Recipe]
ROWS = [{"source": row["prompt"], "target": row["completion"]} for row in colour_rows(12)]


@pytest.fixture(params=["t5", "bart"])
def writer(request: pytest.FixtureRequest, make_task: MakeTask) -> MakeTask:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")

    def make(output: str = "run", rows: Any = ROWS, **sections: Any) -> Recipe:
        return make_task("seq2seq", folder, rows, output, **sections)

    return make


def test_it_learns_writes_and_peft_reads_the_adapter(writer: MakeTask) -> None:
    peft = pytest.importorskip("peft")
    recipe = writer(
        train={"max_steps": 150, "lr": 1e-2},
        adapter={"r": 16, "alpha": 32},
        generate={"max_new_tokens": 10},
        evaluate={"metrics": ["exact_match", "loss"]},
    )
    result = train(recipe)
    assert result.losses[-1] < 0.5 * result.losses[0]
    scored = evaluate(recipe, adapter=result.adapter)
    base = evaluate(recipe)
    assert scored.scores["loss"] < 0.6 * base.scores["loss"]
    if "t5" in recipe.model.name:  # over a random BART LoRA alone does not get so far
        assert scored.scores["exact_match"] > 0.3 > base.scores["exact_match"]
    assert scored.answers[0].prompt == ROWS[0]["source"]
    assert lk.read(result.adapter).spec.info["task"] == "seq2seq"
    theirs = peft.PeftModel.from_pretrained(
        load_model(recipe.model.name, task="seq2seq"), str(result.adapter)
    )
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "decoder_input_ids": torch.tensor([[2, 9, 8]])}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, result.model(**batch).logits, rtol=1e-3, atol=1e-3)


def test_the_loss_is_transformers_own(writer: MakeTask) -> None:
    recipe = writer()
    task = task_of(recipe)
    model, tokenizer = load_model(recipe.model.name, task="seq2seq"), load_tokenizer(recipe.model.name)
    rows = task.rows(tokenizer, "train").rows
    batch = PaddedCollator(2)(rows[:5])
    with torch.no_grad():
        mean = model(**batch).loss.item()
        ours = task.objective.summed(model, model, batch).item() / task.objective.count(batch)
    assert ours == pytest.approx(mean, rel=1e-5)
    assert task.objective.each is not None
    with torch.no_grad():
        losses, owners = task.objective.each(model, model, batch)
        one = task.objective.summed(model, model, PaddedCollator(2)(rows[1:2])).item()
    assert losses[owners == 1].sum().item() == pytest.approx(one, rel=1e-4)


def test_every_target_ends_and_padding_is_not_learnt(writer: MakeTask) -> None:
    tokenizer = load_tokenizer(writer().model.name)
    pairs = [TextPair("a", "f:1", "x", "yy", ("yy",)), TextPair("b", "f:2", "xxxx", "y", ("y",))]
    rows = seq2seq_rows(pairs, tokenizer, max_length=20, overlong="drop")
    assert [row.labels[-1] for row in rows.rows] == [tokenizer.eos_token_id] * 2
    batch = PaddedCollator(int(tokenizer.pad_token_id))(rows.rows)
    assert (batch["labels"] == -100).sum() == 1
    assert batch["attention_mask"].sum().item() == sum(len(row.ids) for row in rows.rows)
    cut = seq2seq_rows(pairs, tokenizer, max_length=2, overlong="truncate")
    assert [len(row.ids) for row in cut.rows] == [1, 2]
    assert cut.truncated == 2
    with pytest.raises(DataError, match="No row is left"):
        seq2seq_rows(pairs, tokenizer, max_length=1, overlong="drop")


def test_beam_search_finds_likelier_texts(writer: MakeTask) -> None:
    recipe = writer(train={"max_steps": 5})
    result = train(recipe)
    sources = [row["source"] for row in ROWS]

    def loss(beams: int) -> float:
        """The mean over whole texts of ``-log p`` of what is written; without a length penalty beams are for that."""
        settings = GenerateSection(max_new_tokens=3, num_beams=beams, length_penalty=0.0)
        texts = generate_from_sources(result.model, result.tokenizer, sources, settings)
        pairs = [TextPair(s, s, s, t, (t,)) for s, t in zip(sources, texts, strict=True)]
        rows = seq2seq_rows(pairs, result.tokenizer, max_length=40, overlong="error").rows
        rows = tuple(replace(row, labels=row.labels[:3]) for row in rows)
        with torch.no_grad():
            return float(
                task_of(recipe).objective.summed(result.model, result.model, PaddedCollator(2)(rows))
            )

    assert loss(8) <= loss(1) + 1e-3
    whole = GenerateSection(max_new_tokens=6, num_beams=4, batch_rows=12)
    single = GenerateSection(max_new_tokens=6, num_beams=4, batch_rows=1)
    assert generate_from_sources(result.model, result.tokenizer, sources, whole) == generate_from_sources(
        result.model, result.tokenizer, sources, single
    )


def test_resuming(writer: MakeTask) -> None:
    settings = {"max_steps": 6, "save_every": 2}
    assert_resumes(lambda output: writer(output, train=settings), 3)


def test_what_is_refused(writer: MakeTask) -> None:
    with pytest.raises(
        RecipeError, match=r"packed is for causal-lm and dpo; with task: seq2seq rows are padded"
    ):
        writer(train={"batching": "packed"})
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="reads one text and writes one"):
        train(writer(rows=[{"messages": turns}]))
    recipe = writer(rows=[{"source": "x" * 70, "target": "y"}])
    if "bart" in recipe.model.name:
        with pytest.raises(ConfigError, match=r"A source has 7\d tokens, but the model reads at most 64"):
            train(recipe)
    else:
        assert train(recipe).steps == 40
