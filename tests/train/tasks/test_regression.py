"""A number for each text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import DataError
from lorakit.models import Classifier, load_classifier
from lorakit.train import Recipe, evaluate, train
from lorakit.train.tasks.regression import OUTPUT, start_head_at
from tests.tiny_encoder import KINDS
from tests.train.test_trainer import assert_resumes

MakeTask = Callable[..., Recipe]
VALUE = {"animal": -1.5, "tree": 0.25, "colour": 2.0}
ROWS = [
    {"text": f"{'very ' * (i % 3)}{word}", "label": VALUE[kind]}
    for kind, words in KINDS.items()
    for i, word in enumerate(words)
]


@pytest.fixture
def measure(make_task: MakeTask, encoder_folder: Path) -> MakeTask:
    def make(output: str = "run", rows: Any = ROWS, **sections: Any) -> Recipe:
        return make_task("regression", encoder_folder, rows, output, **sections)

    return make


def test_it_learns_and_peft_reads_adapter_and_head(measure: MakeTask) -> None:
    peft = pytest.importorskip("peft")
    recipe = measure(train={"max_steps": 120})
    result = train(recipe)
    assert result.losses[-1] < 0.05 * result.losses[0]
    assert result.model.config.problem_type == "regression"
    scores = evaluate(recipe, adapter=result.adapter).scores
    assert scores["pearson"] > 0.95
    assert scores["spearman"] > 0.8
    assert scores["mean_squared_error"] < 0.1
    assert scores["mean_squared_error"] == pytest.approx(result.valid_loss, rel=1e-4)
    bare = load_classifier(recipe.model.name, OUTPUT, seed=9).model
    theirs = peft.PeftModel.from_pretrained(bare, str(result.adapter))
    batch = dict(result.tokenizer(["very cat", "red"], return_tensors="pt", padding=True))
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, result.model(**batch).logits, rtol=1e-4, atol=1e-4)
    # transformers' own loss of the model with labels is the same
    labels = torch.tensor([[0.5], [1.0]])
    with torch.no_grad():
        loss = result.model(**batch, labels=labels).loss
        assert loss.item() == pytest.approx(
            (result.model(**batch).logits - labels).square().mean().item(), rel=1e-5
        )


def test_a_new_head_starts_at_the_mean_of_the_training_numbers(measure: MakeTask) -> None:
    """So the first loss is about their variance, wherever they lie."""
    far = [{**row, "label": row["label"] + 100} for row in ROWS]
    values = torch.tensor([row["label"] for row in far])
    result = train(measure("far", far, train={"max_steps": 1, "batch_rows": len(far), "lr": 1e-9}))
    assert result.losses[0] == pytest.approx(values.var(correction=0).item(), rel=0.25)
    bias = lk.extract(result.model, result.name).tensors["classifier.bias"]["value"]
    assert bias.item() == pytest.approx(values.mean().item(), rel=1e-6)


def test_a_head_that_the_checkpoint_has_is_kept(
    make_task: MakeTask, encoder_folder: Path, tmp_path: Path
) -> None:
    own = load_classifier(encoder_folder, OUTPUT, seed=4).model
    torch.nn.init.constant_(own.classifier.bias, 7.0)
    own.save_pretrained(tmp_path / "own")
    for file in encoder_folder.glob("*token*"):
        shutil.copy(file, tmp_path / "own")
    result = train(make_task("regression", tmp_path / "own", ROWS, train={"max_steps": 1, "lr": 1e-9}))
    assert lk.extract(result.model, result.name).tensors["classifier.bias"]["value"].item() == pytest.approx(
        7
    )


def test_heads_of_every_shape_start_there() -> None:
    class Deeper(torch.nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.dense, self.out_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1, bias=bias)

    for bias in (True, False):
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": Deeper(bias)})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        start_head_at(Classifier(model, OUTPUT, ("head",), True), 3.5)  # type: ignore[arg-type]
        changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert changed == ({"head.out_proj.bias"} if bias else set())


def test_pairs_and_resuming(measure: MakeTask) -> None:
    rows = [{"text": "cat", "second_text": row["text"], "label": str(row["label"])} for row in ROWS]
    data = {"second_text": "second_text"}
    settings = {"max_steps": 6, "save_every": 2}
    whole = assert_resumes(lambda output: measure(output, rows, data=data, train=settings), 3)
    assert {"classifier.weight", "classifier.bias"} <= set(lk.read(whole.adapter).spec.methods)


@pytest.mark.parametrize("value", ["much", True, None, float("nan")])
def test_labels_that_are_no_numbers(measure: MakeTask, value: Any) -> None:
    rows = [*ROWS, {"text": "x", "label": value}]
    with pytest.raises(DataError, match=r"run\.jsonl, line 10: 'label' must be a number"):
        train(measure(rows=rows))


def test_metrics_that_are_asked_for(measure: MakeTask) -> None:
    recipe = measure(train={"max_steps": 1}, evaluate={"metrics": ["mean_absolute_error"]})
    result = train(recipe)
    assert list(evaluate(recipe, adapter=result.adapter).scores) == ["mean_absolute_error"]
