"""DPO: the loss is the paper's, the reference is the base, and what is preferred becomes likelier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.errors import ConfigError, DataError, RecipeError
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, evaluate, generate, read_metrics, train
from lorakit.train.collate import PackedCollator, PaddedCollator
from lorakit.train.pairs import Preference as Pair
from lorakit.train.task import Task
from lorakit.train.tasks import task_of
from lorakit.train.tasks.preference import (
    PreferenceCollator,
    PreferenceRow,
    dpo_losses,
    log_ratios,
    preference_rows,
    with_reference,
)
from tests.train.test_trainer import StopAt

MakeTask = Callable[..., Recipe]

PAIRS = [
    {"prompt": f"{i}{'?' * (i % 3)}", "chosen": "red" + "!" * (i % 4), "rejected": "blue" * (1 + i % 2)}
    for i in range(12)
]


@pytest.fixture
def dpo(make_task: MakeTask, tiny_folder: Path) -> MakeTask:
    def make(output: str = "run", **sections: Any) -> Recipe:
        return make_task("dpo", tiny_folder, PAIRS, output, **sections)

    return make


def plain_log_probability(model: Any, ids: tuple[int, ...], labels: tuple[int, ...]) -> Tensor:
    """The sum of ``log p`` over the labelled tokens, position by position."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(
        (logits[i - 1, label] for i, label in enumerate(labels) if label != -100),
        torch.zeros((), dtype=torch.double),
    )


def plain_loss(model: Any, row: PreferenceRow, beta: float, smoothing: float) -> Tensor:
    """Equation 7 of the paper with the model itself, adapter off, for the reference."""
    policy = [plain_log_probability(model, r.ids, r.labels) for r in (row.chosen, row.rejected)]
    with torch.no_grad(), lk.use(model, None):
        base = [plain_log_probability(model, r.ids, r.labels) for r in (row.chosen, row.rejected)]
    margin = beta * ((policy[0] - base[0]) - (policy[1] - base[1]))
    return -(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))


def rows_of(recipe: Recipe) -> tuple[Any, Any, tuple[PreferenceRow, ...]]:
    model, tokenizer = load_model(recipe.model.name), load_tokenizer(recipe.model.name)
    task: Task = task_of(recipe)
    return model, tokenizer, task.rows(tokenizer, "train").rows


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.2)])
def test_loss_and_gradients_are_those_of_the_plain_formula(
    dpo: MakeTask, batching: str, beta: float, smoothing: float
) -> None:
    recipe = dpo(train={"batching": batching}, preference={"beta": beta, "label_smoothing": smoothing})
    model, tokenizer, rows = rows_of(recipe)
    task = task_of(recipe)
    collator, _ = task.collator(model, tokenizer)
    rows = tuple(task.prepared(model, rows, collator))
    lk.attach(model, lk.LoRA(r=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # somewhere that is not the base
        for parameter in lk.trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours = task.objective.summed(model, model, collator(rows))
    ours.backward()
    got = {name: p.grad.clone() for name, p in lk.trainable(model).items()}
    model.zero_grad()
    plain = sum(plain_loss(model, row, beta, smoothing) for row in rows)
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert abs(ours.item() / len(rows) - math.log(2)) > 1e-3
    for name, parameter in lk.trainable(model).items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_given_log_ratios(smoothing: float) -> None:
    """Worked by hand in float64; TRL's sigmoid loss is the same expression of the same difference."""
    ratios = torch.tensor([[0.5, -1.0], [-2.0, 3.0], [0.0, 0.0]], dtype=torch.double)
    margins = [0.3 * 1.5, 0.3 * -5.0, 0.0]
    expected = [
        (1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * math.log1p(math.exp(m)) for m in margins
    ]
    assert dpo_losses(ratios, 0.3, smoothing).tolist() == pytest.approx(expected, rel=1e-12)
    extreme = dpo_losses(torch.tensor([[-1e4, 1e4]]), 1.0, smoothing)
    assert torch.isfinite(extreme).all()


@pytest.mark.parametrize("inner", [PackedCollator(), PaddedCollator(2)])
def test_the_reference_is_the_base_whatever_is_on_it(dpo: MakeTask, inner: Any) -> None:
    model, _, rows = rows_of(dpo())
    settings = dpo().train
    collator = PreferenceCollator(inner)
    before = with_reference(model, rows, collator, settings)
    lk.attach(model, lk.LoRA(r=4), seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(0.5)
    after = with_reference(model, rows, collator, settings)
    assert [row.reference for row in before] == [row.reference for row in after]
    for row in before:
        with torch.no_grad(), lk.use(model, None):
            exact = [plain_log_probability(model, r.ids, r.labels).item() for r in (row.chosen, row.rejected)]
        assert row.reference == pytest.approx(exact, abs=1e-4)
    with torch.no_grad():
        assert log_ratios(model, model, collator(before)).abs().max() > 1
        with lk.use(model, None):
            assert log_ratios(model, model, collator(before)).abs().max() < 1e-4


def test_it_learns_the_preference_and_peft_reads_the_adapter(dpo: MakeTask) -> None:
    peft = pytest.importorskip("peft")
    recipe = dpo(train={"eval_every": 20})
    result = train(recipe)
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert result.losses[-1] < 0.2
    lines = [line for line in read_metrics(result.folder / "metrics.jsonl") if "valid_loss" in line]
    assert lines[-1]["valid_reward_accuracy"] == 1.0
    assert lines[-1]["valid_reward_margin"] > 1
    scored = evaluate(recipe, adapter=result.adapter)
    assert scored.scores["reward_accuracy"] == 1.0
    assert scored.scores["loss"] == pytest.approx(lines[-1]["valid_loss"], rel=1e-3)
    base = evaluate(recipe)
    assert base.scores == pytest.approx(
        {"reward_accuracy": 0.0, "reward_margin": 0.0, "loss": math.log(2)}, abs=1e-6
    )
    theirs = peft.PeftModel.from_pretrained(load_model(recipe.model.name), str(result.adapter))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(generate(result.model, result.tokenizer, [[{"role": "user", "content": "1?"}]])) == 1


def test_accumulation_and_resuming(dpo: MakeTask) -> None:
    settings = {"max_steps": 4, "batch_rows": 3, "save_every": 2}
    whole = train(dpo("whole", train=settings))
    parts = dpo("parts", train=settings)
    assert train(parts, progress=StopAt(2)).stopped_by == "interrupt"
    resumed = train(parts, resume=True)
    assert resumed.losses == whole.losses
    one = {"max_steps": 1, "max_grad_norm": 0}
    split = train(dpo("split", train={**one, "batch_rows": 3, "accumulation": 4}))
    large = train(dpo("large", train={**one, "batch_rows": 12}))
    assert split.losses == pytest.approx(large.losses, rel=1e-5)


def test_long_answers_are_dropped_or_cut(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    user = ({"role": "user", "content": "x"},)
    pairs = [Pair("a", "f:1", user, "y" * 20, "z" * 100), Pair("b", "f:2", user, "y", "z")]
    dropped = preference_rows(pairs, tokenizer, max_length=60, overlong="drop")
    assert ([row.id for row in dropped.rows], dropped.dropped, dropped.truncated) == (["b"], 1, 0)
    cut = preference_rows(pairs, tokenizer, max_length=60, overlong="truncate")
    assert [len(cut.rows[0].rejected.ids), cut.truncated, cut.dropped] == [60, 1, 0]
    with pytest.raises(DataError, match=r"1 rows are too long: f:1"):
        preference_rows(pairs, tokenizer, max_length=60, overlong="error")


def test_what_is_refused(dpo: MakeTask, make_task: MakeTask, tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"preference is for task: dpo; the task here is causal-lm"):
        make_task("causal-lm", tiny_folder, PAIRS, preference={"beta": 1})
    with pytest.raises(RecipeError, match=r"bleu is no metric for task: dpo"):
        dpo(evaluate={"metrics": ["bleu"]})
    with pytest.raises(DataError, match="no 'chosen' and 'rejected'"):
        train(make_task("dpo", tiny_folder, [{"prompt": "a", "completion": "b"}]))
    long = [{"prompt": "a", "chosen": "b" * 1100, "rejected": "c"}]
    with pytest.raises(ConfigError, match=r"A row has \d+ tokens, but the model reads at most 1024"):
        train(make_task("dpo", tiny_folder, long, train={"max_length": 2000}))


def test_rows_without_a_reference_have_none(dpo: MakeTask) -> None:
    _, _, rows = rows_of(dpo())
    assert "reference" not in PreferenceCollator(PackedCollator())(rows)
    known = [replace(row, reference=(-1.0, -2.0)) for row in rows]
    assert PreferenceCollator(PackedCollator())(known)["reference"].tolist()[0] == [-1.0, -2.0]
