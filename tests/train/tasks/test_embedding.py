"""Vectors of texts: partners find each other, cosines become scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorakit.errors import ConfigError, DataError, RecipeError
from lorakit.models import load_model
from lorakit.train import Recipe, embed, evaluate, train
from lorakit.train.tasks import task_of
from lorakit.train.tasks.embedding import PairCollator, PairRow
from lorakit.train.text_vectors import TextCollator, TextRow, in_batch_negatives, vectors
from tests.tiny_encoder import KINDS
from tests.train.test_trainer import assert_resumes

MakeTask = Callable[..., Recipe]
WORDS = [(word, kind) for kind, words in KINDS.items() for word in words]
PARTNERS = [{"text": f"the {word} is old", "second_text": f"a very {word}"} for word, _ in WORDS]
SCORED = [
    {"text": a, "second_text": b, "likeness": 5 if kind == other else 1}
    for (a, kind), (b, other) in itertools.combinations(WORDS, 2)
]


@pytest.fixture
def embedding(make_task: MakeTask, encoder_folder: Path) -> MakeTask:
    def make(output: str = "run", rows: Any = PARTNERS, **sections: Any) -> Recipe:
        return make_task("embedding", encoder_folder, rows, output, **sections)

    return make


def test_partners_find_each_other_and_peft_reads_the_adapter(embedding: MakeTask) -> None:
    peft = pytest.importorskip("peft")
    recipe = embedding(train={"batch_rows": 9, "max_steps": 60})
    base = evaluate(recipe)
    result = train(recipe)
    assert result.losses[-1] < 0.1 * result.losses[0]
    scored = evaluate(recipe, adapter=result.adapter)
    assert scored.scores["recall_at_1"] == scored.scores["mrr"] == 1.0
    assert base.scores["recall_at_1"] < 0.8
    assert all(answer.correct for answer in scored.answers)
    bare = load_model(recipe.model.name, task="feature-extraction")
    theirs = peft.PeftModel.from_pretrained(bare, str(result.adapter))
    assert theirs.peft_config["default"].task_type == "FEATURE_EXTRACTION"
    texts = ["the cat is old", "red"]
    one, other = (embed(model, result.tokenizer, texts) for model in (theirs, result.model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(2))


def test_cosines_become_scores(embedding: MakeTask) -> None:
    data = {"score": "likeness", "lowest": 1, "highest": 5}
    recipe = embedding(rows=SCORED, data=data, train={"batch_rows": 12, "max_steps": 80})
    base = evaluate(recipe).scores
    result = train(recipe)
    scores = evaluate(recipe, adapter=result.adapter).scores
    assert scores["pearson"] > 0.9 > base["pearson"]
    assert scores["spearman"] > base["spearman"]
    assert result.valid_loss is not None
    assert result.valid_loss < 0.05


def test_in_batch_negatives_by_hand() -> None:
    first, partner = (
        F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), dim=1) for i in (0, 1)
    )
    everything = ~torch.eye(4, dtype=torch.bool)
    got = in_batch_negatives(first, partner, everything, 20.0)
    for i in range(4):
        cosines = [20 * float(first[i] @ partner[j]) for j in range(4)]
        expected = torch.logsumexp(torch.tensor(cosines), 0).item() - cosines[i]
        assert got[i].item() == pytest.approx(expected, abs=1e-4)
    both = in_batch_negatives(first, partner, everything, 20.0, symmetric=True)
    back = in_batch_negatives(partner, first, everything, 20.0)
    torch.testing.assert_close(both, (got + back) / 2)
    # A partner that is no negative is left out of the sum.
    some = everything.clone()
    some[0, 1] = False
    cosines = [20 * float(first[0] @ partner[j]) for j in (0, 2, 3)]
    left = in_batch_negatives(first, partner, some, 20.0)[0].item()
    assert left == pytest.approx(torch.logsumexp(torch.tensor(cosines), 0).item() - cosines[0], abs=1e-4)


def test_equal_texts_are_no_negatives() -> None:
    rows = [
        PairRow("a", (1, 2), (3,), None),
        PairRow("b", (1, 2), (4,), None),
        PairRow("c", (5,), (3,), None),
    ]
    batch = PairCollator(0)(rows)
    assert batch["negative"].tolist() == [[False, False, False], [False, False, True], [False, True, False]]
    assert batch["input_ids"].tolist() == [[1, 2], [1, 2], [5, 0], [3, 0], [4, 0], [3, 0]]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_does_not_change_a_vector(embedding: MakeTask, pooling: Any) -> None:
    model = load_model(embedding().model.name, task="feature-extraction")
    rows = [TextRow("a", (2, 5, 3)), TextRow("b", (2, 5, 6, 7, 8, 3))]
    collator = TextCollator(0)
    with torch.no_grad():
        together = vectors(model, collator(rows), pooling)
        states = model(input_ids=torch.tensor([rows[0].ids])).last_hidden_state[0]
        alone = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    torch.testing.assert_close(together[0], F.normalize(alone, dim=0), rtol=1e-4, atol=1e-5)


def test_rows_are_chosen_by_value(embedding: MakeTask) -> None:
    rows = [{**row, "kind": "yes" if i % 2 else "no"} for i, row in enumerate(PARTNERS)]
    recipe = embedding(rows=rows, data={"where": {"kind": "yes"}, "max_rows": {"test": 3}})
    task = task_of(recipe)
    assert [len(task.examples(split, None)) for split in ("train", "test")] == [4, 3]
    with pytest.raises(DataError, match="No row of the train split has the values"):
        train(embedding(rows=rows, data={"where": {"kind": "maybe"}}))


def test_resuming(embedding: MakeTask) -> None:
    settings = {"max_steps": 6, "save_every": 2}
    assert_resumes(lambda output: embedding(output, train=settings), 3)


def test_what_is_refused(embedding: MakeTask) -> None:
    with pytest.raises(ConfigError, match=r"name their column in data\.score"):
        train(embedding(embedding={"loss": "cosine"}))
    with pytest.raises(ConfigError, match=r"would ignore data\.score"):
        train(embedding(rows=SCORED, data={"score": "likeness"}, embedding={"loss": "in_batch_negatives"}))
    with pytest.raises(DataError, match=r"line 1: the score 1|the score 5 is not between 0 and 1"):
        train(embedding(rows=SCORED, data={"score": "likeness"}))
    with pytest.raises(ConfigError, match="spearman is for data with scores"):
        evaluate(embedding(evaluate={"metrics": ["spearman"]}))
    with pytest.raises(RecipeError, match="must be below highest"):
        embedding(data={"lowest": 2, "highest": 1})
