"""Several adapters in one pass: each becomes what it becomes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, RecipeError, TrainingError
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, evaluate, read_metrics, train
from lorakit.train.tasks import task_of
from lorakit.train.tasks.several import OwnedRow, row_of
from tests.tiny_chat import colour_rows, write_rows
from tests.train.test_trainer import StopAt, assert_equal

MakeRecipe = Callable[..., Recipe]


def backwards(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "completion": row["completion"][::-1]} for row in rows]


@pytest.fixture
def several(tiny_folder: Path, tmp_path: Path) -> MakeRecipe:
    """Two adapters of different ranks, targets, rates and numbers of rows."""
    one = str(write_rows(tmp_path / "one.jsonl", colour_rows(24)))
    two = str(write_rows(tmp_path / "two.jsonl", backwards(colour_rows(10))))

    def make(output: str = "run", more: dict[str, Any] | None = None, **settings: Any) -> Recipe:
        t5 = (more or {}).get("task") == "seq2seq"
        targets = ["q", "v"] if t5 else ["q_proj", "v_proj"]
        adapters = [
            {"name": "one", "r": 4, "alpha": 8, "data": {"train": one, "valid": one, "test": one}},
            {
                "name": "two",
                "r": 2,
                "targets": targets,
                "lr": 5e-3,
                "data": {"train": two, "test": two},
            },
        ]
        return Recipe.from_mapping(
            {
                "model": str(tiny_folder),
                "adapters": adapters,
                "train": {"max_steps": 8, "batch_rows": 4, "lr": 1e-2, **settings},
                "output": str(tmp_path / output),
                **(more or {}),
            }
        )

    return make


def alone(recipe: Recipe, name: str, output: Path) -> Any:
    (part,) = (part for part in recipe.parts() if part.adapter.name == name)
    return train(part.model_copy(update={"output": output}))


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("length", [{"max_steps": 8}, {"max_steps": None, "epochs": 2, "accumulation": 2}])
def test_each_becomes_what_it_becomes_alone(
    several: MakeRecipe, tmp_path: Path, batching: str, length: dict[str, Any]
) -> None:
    """With epochs the second adapter's rows end early: its schedule ends with them, and it then stays as it is."""
    recipe = several(batching=batching, max_grad_norm=0.5, weight_decay=0.01, **length)
    result = train(recipe)
    assert list(result.adapters) == ["one", "two"]
    for name, folder in result.adapters.items():
        assert folder == recipe.output / name / "adapter"
        own = alone(recipe, name, tmp_path / f"alone-{name}")
        losses = result.losses_of[name]
        assert list(own.losses) == pytest.approx(losses[: own.steps], rel=1e-5)
        assert losses[own.steps :] == [0.0] * (result.steps - own.steps)
        ours, theirs = lk.read(folder), lk.read(own.adapter)
        assert ours.spec.methods == theirs.spec.methods
        for path, group in theirs.tensors.items():
            for key, tensor in group.items():
                torch.testing.assert_close(ours.tensors[path][key], tensor, rtol=1e-5, atol=1e-5)
        moved = lk.extract(result.model, name)
        assert (
            max(t.abs().max() for g in moved.tensors.values() for k, t in g.items() if k == "lora_B") > 1e-4
        )


def test_what_is_told_and_scored(several: MakeRecipe) -> None:
    recipe = several(more={"evaluate": {"metrics": ["loss"]}}, max_steps=80, log_every=20, eval_every=40)
    result = train(recipe)
    lines = read_metrics(result.folder / "metrics.jsonl")
    assert {"loss", "loss_one", "loss_two"} <= set(lines[0])
    measured = [line for line in lines if "valid_loss" in line]
    assert measured[-1]["valid_loss"] == measured[-1]["valid_loss_one"]  # the other one has no valid split
    run = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert run["trainable"] == sum(report.trainable for report in result.reports.values())
    assert Recipe.from_mapping(run["recipe"]).plain() == run["recipe"]
    own: dict[tuple[str, str], float] = {}
    for part in recipe.parts():
        for name, folder in result.adapters.items():
            own[part.adapter.name, name] = evaluate(part, adapter=folder).scores["loss"]
    assert own["one", "one"] < 0.6 * own["one", "two"]
    assert own["two", "two"] < 0.6 * own["two", "one"]
    with pytest.raises(ConfigError, match=r"2 adapters, each with data of its own"):
        evaluate(recipe)


def test_peft_reads_each(several: MakeRecipe) -> None:
    peft = pytest.importorskip("peft")
    result = train(several())
    ids = torch.tensor([[5, 6, 7]])
    for name, folder in result.adapters.items():
        theirs = peft.PeftModel.from_pretrained(load_model(several().model.name), str(folder))
        with torch.no_grad(), lk.use(result.model, name):
            torch.testing.assert_close(theirs(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(several: MakeRecipe, stop: int) -> None:
    settings = {"save_every": 3, "max_steps": None, "epochs": 2, "log_every": 2}
    whole = train(several("whole", **settings))
    assert train(several("parts", **settings), progress=StopAt(stop)).stopped_by == "interrupt"
    resumed = train(several("parts", **settings), resume=True)
    assert resumed.losses == whole.losses
    assert resumed.losses_of == whole.losses_of
    for name, folder in whole.adapters.items():
        assert_equal(resumed.adapters[name], folder)
    checkpoint = max((whole.folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for name, folder in whole.adapters.items():
        assert_equal(checkpoint / name, folder)


def test_t5_learns_several(several: MakeRecipe, t5_folder: Path, tmp_path: Path) -> None:
    recipe = several(more={"task": "seq2seq", "model": str(t5_folder)}, lr=2e-2)
    result = train(recipe)
    for name in result.adapters:
        own = alone(recipe, name, tmp_path / f"alone-{name}")
        assert list(own.losses) == pytest.approx(result.losses_of[name], rel=1e-4)


def test_rows_are_cut_out_of_batches(several: MakeRecipe) -> None:
    recipe = several()
    task = task_of(recipe)
    tokenizer = load_tokenizer(recipe.model.name)
    rows = task.rows(tokenizer, "train").rows
    assert str(task.rows(tokenizer, "train")).endswith("rows of 2 adapters: one 24, two 10")
    some: list[OwnedRow] = [rows[0], rows[30], rows[3]]
    for batching in ("packed", "padded"):
        part = task_of(several(batching=batching))
        collator, _ = part.collator(load_model(recipe.model.name), tokenizer)
        batch = collator(some)
        assert batch["owners"].tolist() == [0, 1, 0]
        counts = task.objective.count(batch)
        learnt = [sum(label != -100 for label in row.row.labels) for row in some]
        assert counts.tolist() == [learnt[0] + learnt[2], learnt[1]]
        rest = {name: tensor for name, tensor in batch.items() if name != "owners"}
        one = row_of(rest, 1)["input_ids"][0].tolist()
        assert one[: some[1].length] == list(some[1].row.ids)


def test_a_method_that_follows_the_steps_needs_all_of_them(several: MakeRecipe, tmp_path: Path) -> None:
    recipe = several(max_steps=None, epochs=2)
    plain = recipe.plain()
    plain["adapters"][1] = {
        "name": "two", "method": "dylora", "r": 4, "data": plain["adapters"][1]["data"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"the adapter 'two' follows the steps .* last for 6 of 12 steps"):
        train(Recipe.from_mapping(plain))
    plain["train"] |= {"epochs": None, "max_steps": 3}
    assert train(Recipe.from_mapping(plain)).steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"r": 2}}, "adapter and adapters say the same thing"),
        ({"data": {"train": "other.jsonl"}}, "each one has its own data"),
        ({"adapters": []}, "at least 1 item"),
        ({"adapters": [{"name": "a", "data": {"train": "x"}}] * 2}, "two of the adapters are called 'a'"),
        ({"adapters": [{"name": "a", "data": {"train": "x"}, "rr": 1}]}, r"rr.*is not a key of a recipe"),
        ({"adapters": [{"name": "a", "r": 2}]}, r"adapters\.data.* is missing"),
        ({"task": "dpo"}, "adapters is for task: causal-lm and seq2seq"),
    ],
)
def test_recipes_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    good = {"model": "m", "adapters": [{"name": "a", "data": {"train": "x"}}], "output": "o"}
    Recipe.from_mapping(good)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_mapping({**good, **change})


def test_other_data_are_not_resumed(several: MakeRecipe, tmp_path: Path) -> None:
    train(several(save_every=4))
    write_rows(tmp_path / "two.jsonl", backwards(colour_rows(9)))
    with pytest.raises((ConfigError, TrainingError), match="training data is not what"):
        train(several(save_every=4), resume=True)
