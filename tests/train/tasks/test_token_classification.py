"""A tag for each word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError, DataError
from lorakit.models import load_classifier
from lorakit.train import Recipe, evaluate, read_metrics, train
from lorakit.train.collate import PaddedCollator
from lorakit.train.tasks.token_classification import TaggedWords, tag_names, tag_rows
from tests.tiny_encoder import KINDS, kind_rows
from tests.train.test_trainer import assert_resumes

MakeTask = Callable[..., Recipe]
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}


def tagged(text: str) -> dict[str, list[str]]:
    words = text.split()
    return {"tokens": words, "tags": [f"B-{KIND_OF[w]}" if w in KIND_OF else "O" for w in words]}


ROWS = [tagged(row["text"]) for row in kind_rows(27)]


@pytest.fixture
def tagger(make_task: MakeTask, encoder_folder: Path) -> MakeTask:
    def make(output: str = "run", rows: Any = ROWS, **sections: Any) -> Recipe:
        return make_task("token-classification", encoder_folder, rows, output, **sections)

    return make


def test_it_learns_and_peft_reads_adapter_and_head(tagger: MakeTask) -> None:
    peft = pytest.importorskip("peft")
    recipe = tagger(train={"max_steps": 100})
    result = train(recipe)
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert result.model.config.id2label[0] == "O"
    scored = evaluate(recipe, adapter=result.adapter)
    assert scored.scores["accuracy"] > 0.95
    assert scored.scores["entity_f1"] > 0.9
    assert {s.name for s in scored.labels} == {"O", "B-animal", "B-colour", "B-tree"}
    assert sum(s.count for s in scored.labels) == sum(len(row["tokens"]) for row in ROWS)
    last = read_metrics(result.folder / "metrics.jsonl")[-1]
    assert last["valid_accuracy"] == pytest.approx(scored.scores["accuracy"])
    assert last["valid_loss"] == pytest.approx(scored.scores["loss"], rel=1e-4)
    labels = [result.model.config.id2label[i] for i in range(4)]
    bare = load_classifier(recipe.model.name, labels, task="token-classification", seed=9).model
    theirs = peft.PeftModel.from_pretrained(bare, str(result.adapter))
    assert theirs.peft_config["default"].task_type == "TOKEN_CLS"
    ids = torch.tensor([[2, 5, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_first_token_of_a_word_has_its_tag(tagger: MakeTask) -> None:
    """The tiny chat model's tokens are bytes: words have several."""
    from tests.tiny_chat import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = tag_rows(
        [TaggedWords("f:1", ("ab", "c"), ("X", "O"))], ("O", "X"), tokenizer, max_length=9, overlong="drop"
    )
    assert rows.rows[0].labels == (1, -100, 0)
    cut = tag_rows(
        [TaggedWords("f:1", ("ab", "c"), ("X", "O"))],
        ("O", "X"),
        tokenizer,
        max_length=2,
        overlong="truncate",
    )
    assert (cut.rows[0].labels, cut.truncated, cut.learnt) == ((1, -100), 1, 1)
    assert PaddedCollator(0)([*rows.rows, *cut.rows])["labels"].tolist() == [[1, -100, 0], [1, -100, -100]]


def test_words_behind_the_cut_are_missed(tagger: MakeTask) -> None:
    recipe = tagger(train={"max_steps": 60})
    result = train(recipe)
    short = tagger("short", train={"max_length": 4, "overlong": "truncate"})
    scored = evaluate(short, adapter=result.adapter)
    read = sum(min(len(row["tokens"]), 2) for row in ROWS)
    assert scored.scores["accuracy"] <= read / sum(len(row["tokens"]) for row in ROWS)


def test_resuming(tagger: MakeTask) -> None:
    settings = {"max_steps": 6, "save_every": 2, "accumulation": 2}
    assert_resumes(lambda output: tagger(output, train=settings), 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["cat"], "tags": ["O", "O"]}, "1 words in 'tokens', 2 tags in 'tags'"),
        ({"tokens": "cat", "tags": ["O"]}, "'tokens' is text, but not the JSON of a list"),
        ({"tokens": [], "tags": []}, "'tokens' must be a list of one or more words"),
        ({"tokens": ["cat", " "], "tags": ["O", "O"]}, "'tokens' holds ' ', which is no word"),
        ({"tokens": ["cat"]}, "'tags' is missing"),
    ],
)
def test_rows_that_are_wrong(tagger: MakeTask, row: Any, message: str) -> None:
    recipe = tagger(rows=[*ROWS, row])
    with pytest.raises(DataError, match=rf"run\.jsonl, line 28: {message}"):
        train(recipe)


def test_a_word_without_tokens() -> None:
    class Encoded(dict[str, list[list[int]]]):
        def word_ids(self, row: int) -> list[int | None]:
            return [None, 0, None]

    class Tokenizer:
        model_max_length = 64

        def __call__(self, rows: list[list[str]], **_: Any) -> Encoded:
            return Encoded(input_ids=[[2, 5, 3] for _ in rows])

    words = [TaggedWords("f:7", ("cat", "\u200b"), ("X", "O"))]
    with pytest.raises(DataError, match=r"f:7: the tokenizer makes no token of the word"):
        tag_rows(words, ("O", "X"), Tokenizer(), max_length=9, overlong="drop")  # type: ignore[arg-type]


def test_tags(tagger: MakeTask, tmp_path: Path) -> None:
    assert tag_names([TaggedWords("p", ("a", "b", "c"), ("B-z", "O", "B-a"))]) == ("O", "B-a", "B-z")
    with pytest.raises(DataError, match="nothing to tell apart"):
        tag_names([TaggedWords("p", ("a",), ("O",))])
    result = train(tagger(train={"max_steps": 1}))
    other = tagger("other", rows=[{"tokens": ["cat"], "tags": ["B-animl"]}])
    with pytest.raises(DataError, match=r"the tag 'B-animl' is none of those .* Did you mean 'B-animal'"):
        evaluate(other, adapter=result.adapter)
    plain = [{"tokens": ["cat", "red"], "tags": ["noun", "adjective"]}] * 4
    asked = tagger("plain", rows=plain, train={"max_steps": 1}, evaluate={"metrics": ["entity_f1"]})
    with pytest.raises((ConfigError, DataError), match="entity_f1 needs tags that begin with B- and I-"):
        evaluate(asked, adapter=train(asked).adapter)
