"""Classifiers: they learn with any adapter on the body, the head is saved along, and runs are as exact as others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, DataError, ModelError, RecipeError
from lorakit.models import load_classifier, load_model, load_tokenizer
from lorakit.train import Recipe, classify, evaluate, read_metrics, train
from lorakit.train.classifying import adapter_labels
from lorakit.train.merging import merge_to_folder
from tests.tiny_chat import save_tiny_chat, write_rows
from tests.tiny_encoder import kind_rows, save_tiny_encoder
from tests.train.test_trainer import assert_resumes, tensors

MakeRecipe = Callable[..., Recipe]
LABELS = ("animal", "colour", "tree")
HEAD = ["classifier.bias", "classifier.weight"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture
def classifier(encoder: Path, tmp_path: Path) -> MakeRecipe:
    """Make a recipe for the tiny encoder; keywords replace sections or add to ``train``."""

    def make(output: str = "run", sections: dict[str, Any] | None = None, **settings: Any) -> Recipe:
        data = tmp_path / "rows.jsonl"
        if not data.exists():
            write_rows(data, kind_rows(45))
        return Recipe.from_mapping(
            {
                "task": "classification",
                "model": str(encoder),
                "adapter": {"r": 4},
                "data": {"train": str(data), "test": str(data)},
                "train": {"max_steps": 6, "batch_rows": 9, "lr": 1e-2, "warmup": 0, **settings},
                "output": str(tmp_path / output),
                **(sections or {}),
            }
        )

    return make


def values(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(folder)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "names": {"r": 4, "targets": ["query", "value"], "rank_pattern": {"query": 2}},
    "expression": {"r": 4, "targets": r".*layer\.1\..*query"},
    "dora": {"method": "dora", "r": 4},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full"},
    "groups": {"groups": {"query": {"r": 2}, "LayerNorm": {"method": "full"}}},
    "head alone": {"method": "full", "targets": ["classifier"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_learns_and_brings_its_head(classifier: MakeRecipe, name: str) -> None:
    # A head alone, over a body that knows nothing, has little to train: it takes more and longer steps.
    lr, steps = {"bitfit": (2e-2, 40), "head alone": (0.1, 80)}.get(name, (1e-2, 40))
    recipe = classifier(sections={"adapter": ADAPTERS[name]}, max_steps=steps, lr=lr)
    result = train(recipe)
    saved = lk.read(result.adapter)
    assert set(HEAD) <= set(saved.spec.methods)
    assert adapter_labels(result.adapter) == LABELS
    if name == "head alone":
        assert sorted(saved.spec.methods) == HEAD
        assert result.report.trainable == 3 * 32 + 3
    scored = evaluate(recipe, adapter=result.adapter)
    here = evaluate(recipe, model=result.model, tokenizer=result.tokenizer)
    assert scored.scores == pytest.approx(here.scores, rel=1e-5)
    assert scored.scores["loss"] < 1.0 < math.log(3)  # which is that of knowing nothing
    assert scored.scores["accuracy"] > 0.5
    assert sum(label.count for label in scored.labels) == scored.count == 45


def test_what_a_run_leaves(classifier: MakeRecipe, tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    recipe = classifier(
        sections={"data": {"train": rows, "valid": rows}}, eval_every=3, log_every=2, epochs=None
    )
    result = train(recipe)
    run = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert run["info"]["labels"] == list(LABELS)
    assert Recipe.from_mapping(run["recipe"]).plain() == run["recipe"]
    lines = read_metrics(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "valid_accuracy" in line] == [3, 6]
    assert all(line["learnt_rows"] == 18 for line in lines if "loss" in line)
    assert result.learnt_tokens == 6 * 9
    assert result.model.config.id2label == dict(enumerate(LABELS))
    config = json.loads((result.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]


def test_the_valid_loss_is_the_loss_of_the_labels(classifier: MakeRecipe, tmp_path: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    recipe = classifier(sections={"data": {"train": rows, "valid": rows, "test": rows}})
    result = train(recipe)
    scores = evaluate(recipe, adapter=result.adapter).scores
    assert result.valid_loss == pytest.approx(scores["loss"], rel=1e-5)
    last = [line for line in read_metrics(result.folder / "metrics.jsonl") if "valid_loss" in line][-1]
    assert last["valid_accuracy"] == pytest.approx(scores["accuracy"])


def test_the_same_seed_gives_the_same_head_and_file(classifier: MakeRecipe) -> None:
    one, two, three = (train(classifier(n, seed=s)).adapter for n, s in (("a", 1), ("b", 1), ("c", 2)))
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
    assert (one / weights).read_bytes() != (three / weights).read_bytes()
    start = train(classifier("d", seed=1, max_steps=1, lr=1e-12)).adapter
    fresh = load_classifier(classifier().model.name, LABELS, seed=1).model.classifier
    assert torch.allclose(values(start)["classifier.weight.value"], fresh.weight)


def test_accumulation_equals_one_large_batch(classifier: MakeRecipe) -> None:
    settings: dict[str, Any] = {"epochs": 1, "max_steps": None, "max_grad_norm": 0}
    split = train(classifier("split", batch_rows=7, accumulation=7, **settings))
    whole = train(classifier("whole", batch_rows=45, **settings))
    assert split.steps == whole.steps == 1
    assert split.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
    for name, tensor in values(whole.adapter).items():
        assert torch.allclose(values(split.adapter)[name], tensor, atol=1e-4), name


@pytest.mark.parametrize(
    "adapter", [{"r": 2, "dropout": 0.3}, {"groups": {"query": {"method": "dora", "r": 2}}}]
)
def test_a_stopped_run_goes_on_bit_for_bit(classifier: MakeRecipe, adapter: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "sections": {"adapter": adapter}, "lora_plus_ratio": 4}
    assert_resumes(lambda output: classifier(output, **settings), 3)


def test_a_fresh_pooler_is_trained_and_saved_with_the_head(classifier: MakeRecipe, tmp_path: Path) -> None:
    bare = save_tiny_encoder(tmp_path / "bare", pooler=False)
    recipe = classifier(sections={"model": str(bare)}, max_steps=40)
    result = train(recipe)
    paths = set(lk.read(result.adapter).spec.methods)
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", *HEAD} <= paths
    assert "bert.pooler.dense" not in paths  # no LoRA on what is trained whole
    assert evaluate(recipe, adapter=result.adapter).scores["accuracy"] > 0.6


def test_a_decoder_classifies_at_its_last_token_however_rows_are_padded(
    classifier: MakeRecipe, tmp_path: Path
) -> None:
    chat = save_tiny_chat(tmp_path / "chat")
    recipe = classifier(sections={"model": str(chat)}, max_steps=60)
    result = train(recipe)
    assert {"score.weight"} <= set(lk.read(result.adapter).spec.methods)
    together = evaluate(recipe, adapter=result.adapter)
    assert together.scores["accuracy"] > 0.6
    alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_rows": 1})})
    assert evaluate(alone, adapter=result.adapter).scores == pytest.approx(together.scores, abs=1e-4)


def test_pairs(classifier: MakeRecipe, tmp_path: Path) -> None:
    """Whether both texts name the same thing: neither text alone tells."""
    words = ("cat", "dog", "cow")
    rows = [{"a": a, "b": b, "same": int(a == b)} for a in words for b in words] * 4
    file = str(write_rows(tmp_path / "pairs.jsonl", rows))
    data = {"train": file, "test": file, "text": "a", "second_text": "b", "label": "same"}
    recipe = classifier(sections={"data": data, "adapter": {"r": 8}}, max_steps=120)
    result = train(recipe)
    assert adapter_labels(result.adapter) == ("0", "1")
    scored = evaluate(recipe, adapter=result.adapter)
    assert scored.scores["accuracy"] > 0.9
    first, second = classify(result.model, result.tokenizer, [("cat", "cat"), ("cat", "dog")])
    assert (first.label, second.label) == ("1", "0")
    assert first.probabilities["0"] == pytest.approx(1 - first.probability, abs=1e-6)
    assert scored.answers[1].prompt == "cat\ndog"


def test_a_merged_folder_is_an_ordinary_classifier(classifier: MakeRecipe, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, pipeline

    recipe = classifier(max_steps=40)
    result = train(recipe)
    merged = merge_to_folder(recipe.model.name, [result.adapter], tmp_path / "merged")
    assert merged.saved_difference < 1e-4 < merged.adapter_effect
    plain = AutoModelForSequenceClassification.from_pretrained(merged.folder)
    assert plain.config.id2label == dict(enumerate(LABELS))
    said = pipeline("text-classification", str(merged.folder))(["cat is old", "red is old"])
    ours = classify(result.model, result.tokenizer, ["cat is old", "red is old"])
    assert [one["label"] for one in said] == [one.label for one in ours]
    assert [one["score"] for one in said] == pytest.approx([one.probability for one in ours], abs=1e-5)
    again = evaluate(
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(merged.folder)})})
    )
    assert again.scores == pytest.approx(evaluate(recipe, adapter=result.adapter).scores, abs=1e-5)


def test_adapters_for_other_labels_are_not_merged_into_one(
    classifier: MakeRecipe, recipe: MakeRecipe, tmp_path: Path
) -> None:
    one = train(classifier("one", max_steps=1))
    rows = [{**row, "label": row["label"][0]} for row in kind_rows(9)]
    data = {"train": str(write_rows(tmp_path / "other.jsonl", rows))}
    two = train(classifier("two", max_steps=1, sections={"data": data}))
    with pytest.raises(ConfigError, match=r"tells apart animal, colour, tree, and .* tells apart a, c, t"):
        merge_to_folder(str(one.model.name_or_path), [one.adapter, two.adapter], tmp_path / "merged")
    three = train(recipe("three", max_steps=1))
    with pytest.raises(ConfigError, match=r"and .*three.* brings no head"):
        merge_to_folder(str(one.model.name_or_path), [one.adapter, three.adapter], tmp_path / "merged")


def test_peft_reads_the_adapter_with_its_head(classifier: MakeRecipe) -> None:
    peft = pytest.importorskip("peft")
    result = train(classifier(max_steps=5))
    theirs = peft.PeftModel.from_pretrained(
        load_classifier(classifier().model.name, LABELS, seed=99).model, str(result.adapter)
    )
    batch = dict(result.tokenizer(["the cat is old", "red"], return_tensors="pt", padding=True))
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, result.model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_loaded_already(classifier: MakeRecipe) -> None:
    recipe = classifier()
    model = load_classifier(recipe.model.name, ("x", "y", "z"), seed=0).model
    result = train(recipe, model=model, tokenizer=load_tokenizer(recipe.model.name))
    assert result.model is model
    assert model.config.label2id == {"animal": 0, "colour": 1, "tree": 2}
    lk.detach(model)
    two = load_classifier(recipe.model.name, ("x", "y")).model
    with pytest.raises(
        ConfigError, match="a head for 2 labels; the training data has 3: animal, colour, tree"
    ):
        train(recipe, model=two, overwrite=True)
    with pytest.raises(ModelError, match="has no classification head"):
        train(recipe, model=load_model(recipe.model.name, task="feature-extraction"), overwrite=True)


# ---- what is refused -----------------------------------------------------------------------------------------------
def test_a_label_that_training_has_not(classifier: MakeRecipe, tmp_path: Path) -> None:
    rows = [*kind_rows(4), {"text": "elm", "label": "tre"}]
    other = str(write_rows(tmp_path / "test.jsonl", rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "valid": other, "test": other}
    message = r"test\.jsonl, line 5: the label 'tre' is none of those .* Did you mean 'tree'\?"
    with pytest.raises(DataError, match=message):
        train(classifier(sections={"data": data}))
    result = train(classifier())
    with pytest.raises(DataError, match=message):
        evaluate(classifier(sections={"data": data}), adapter=result.adapter)


def test_the_head_cannot_be_excluded(classifier: MakeRecipe) -> None:
    recipe = classifier(sections={"adapter": {"r": 2, "exclude": ["classifier"]}})
    with pytest.raises(ConfigError, match=r"adapter\.exclude leaves out classifier\.\w+, a part of the head"):
        train(recipe)
    excluded = classifier(sections={"adapter": {"r": 2, "exclude": ["value"]}})
    assert not [path for path in lk.read(train(excluded).adapter).spec.methods if path.endswith("value")]


def test_a_base_model_without_a_head_is_not_scored(classifier: MakeRecipe) -> None:
    with pytest.raises(ModelError, match="no classification head of its own"):
        evaluate(classifier())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"evaluate": {"metrics": ["bleu"]}},
            "bleu is no metric for task: classification; there are accuracy",
        ),
        ({"train": {"batching": "packed"}}, "packed is for causal-lm"),
        ({"data": {"train": "a.csv", "system": "x"}}, "'data.system' is not a key of a recipe"),
        ({"data": {"test": "a.csv", "max_rows": {"test": 0}}}, "max_rows must be at least 1"),
        ({"data": {}}, "name at least one file"),
        ({"task": "classify"}, "'task' is wrong"),
        (
            {"task": "causal-lm", "evaluate": {"metrics": ["accuracy"]}},
            "accuracy is no metric for task: causal-lm",
        ),
        ({"train": {"fast": ["A"]}}, "by no ratio: set lora_plus_ratio"),
    ],
)
def test_recipes_that_make_no_sense(section: dict[str, Any], message: str) -> None:
    values = {"task": "classification", "model": "m", "data": {"train": "a.csv"}, "output": "o", **section}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_mapping(values)


def test_an_adapter_that_does_not_say_its_labels_takes_the_datas(
    classifier: MakeRecipe, tmp_path: Path
) -> None:
    import dataclasses

    recipe = classifier(max_steps=40)
    result = train(recipe)
    state = lk.extract(result.model)
    silent = dataclasses.replace(state, spec=dataclasses.replace(state.spec, info={}))
    lk.save(silent, tmp_path / "silent")
    assert evaluate(recipe, adapter=tmp_path / "silent").scores == pytest.approx(
        evaluate(recipe, adapter=result.adapter).scores
    )
    without = classifier(sections={"data": {"test": str(tmp_path / "rows.jsonl")}})
    assert evaluate(without, adapter=result.adapter).count == 45
    with pytest.raises(ConfigError, match="does not say what labels it tells apart"):
        evaluate(without, adapter=tmp_path / "silent")


def test_lora_plus_in_a_recipe(classifier: MakeRecipe) -> None:
    """AdamW's first step is ``lr * sign(g)``: ``B`` goes 16 times as far, the head does not."""
    settings: dict[str, Any] = {"max_steps": 1, "lr": 1e-3, "schedule": "constant", "max_grad_norm": 0}
    result = train(classifier("plus", lora_plus_ratio=16, **settings))
    plain = train(classifier("plain", **settings))
    query = "bert.encoder.layer.0.attention.self.query.lora_B"
    assert values(result.adapter)[query].abs().max() == pytest.approx(16e-3, rel=1e-2)
    assert values(plain.adapter)[query].abs().max() == pytest.approx(1e-3, rel=1e-2)
    head = "classifier.weight.value"
    assert torch.equal(values(result.adapter)[head], values(plain.adapter)[head])


def test_lora_plus_where_nothing_would_be_fast(classifier: MakeRecipe) -> None:
    with pytest.raises(
        RecipeError, match=r"makes B faster, and no method of the adapter has that: say which of copy"
    ):
        classifier(sections={"adapter": {"method": "bitfit"}}, lora_plus_ratio=16)
