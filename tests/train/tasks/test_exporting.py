"""Every task's adapter becomes an ordinary model: streamed or in memory, the same one, with its head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaModel, ViTModel

import lorakit as lk
from lorakit.errors import ConfigError, MergeError
from lorakit.models import load_classifier, load_tokenizer
from lorakit.models.cifar_resnet import load_cifar_resnet
from lorakit.models.image_classifier import find_image_model, load_image_classifier
from lorakit.models.streaming_merge import merge_checkpoint
from lorakit.train import Recipe, embed, evaluate, train
from lorakit.train.exporting import export
from lorakit.train.merging import merge_to_folder
from tests.tiny_chat import colour_rows, save_tiny_chat, tiny_tokenizer, write_rows
from tests.tiny_encoder import kind_rows
from tests.train.tasks.test_image_classification import pictures, resnet, vit  # noqa: F401 - fixtures
from tests.train.tasks.test_preference import PAIRS
from tests.train.tasks.test_token_classification import ROWS as TAGGED

MakeTask = Callable[..., Recipe]
IDS = torch.tensor([[2, 5, 9, 3]])
SEQ2SEQ = [{"source": row["prompt"], "target": row["completion"]} for row in colour_rows(12)]
NUMBERS = [{"text": row["text"], "label": len(row["text"])} for row in kind_rows(18)]
PARTNERS = [{"text": f"the {w} is old", "second_text": f"a very {w}"} for w in ("cat", "oak", "red", "dog")]
ROWS: dict[str, Any] = {
    "causal-lm": colour_rows(12),
    "dpo": PAIRS,
    "seq2seq": SEQ2SEQ,
    "classification": kind_rows(18),
    "regression": NUMBERS,
    "token-classification": TAGGED,
    "embedding": PARTNERS,
}
CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "dpo": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model") / "decoder")


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Recipe]:
    file = tmp_path / "pictures.npz"
    numpy.savez(file, **pictures(24))

    def make(model: Path, classes: int = 3, **adapter: Any) -> Recipe:
        return Recipe.from_mapping(
            {
                "task": "image-classification",
                "model": str(model),
                "adapter": {"r": 2, **adapter},
                "data": {
                    "train": str(file),
                    "test": str(file),
                    "classes": [f"bar {i}" for i in range(classes)],
                },
                "train": {"max_steps": 8, "batch_rows": 8, "lr": 1e-2},
                "output": str(tmp_path / "run"),
            }
        )

    return make


def outputs(model: Any, **inputs: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        said = model.eval()(**inputs)
    return said.logits if hasattr(said, "logits") else said.last_hidden_state  # type: ignore[no-any-return]


def read_back(folder: Path, task: str) -> Any:
    """What transformers makes of a folder, where nothing may be missing."""
    model, info = getattr(transformers, CLASSES[task]).from_pretrained(folder, output_loading_info=True)
    missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
    assert not missing
    assert not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("task", ROWS)
def test_each_task_is_streamed_into_a_model_of_its_class(
    task: str, make_task: MakeTask, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind = {"causal-lm": "decoder", "dpo": "decoder", "seq2seq": "t5"}.get(task, "encoder")
    recipe = make_task(task, request.getfixturevalue(f"{kind}_folder"), ROWS[task], train={"max_steps": 8})
    result = train(recipe)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if task == "seq2seq" else {})}
    expected = outputs(result.model, **inputs)
    with lk.use(result.model, None):
        assert not torch.allclose(outputs(result.model, **inputs), expected, rtol=0, atol=1e-3)
    done = export(result.folder, "merged", out=tmp_path / "streamed")
    assert done.rounding is not None
    assert done.rounding < 1e-3
    merged = read_back(done.path, task)
    torch.testing.assert_close(outputs(merged, **inputs), expected, rtol=1e-4, atol=1e-4)
    assert type(merged).__name__ == merged.config.architectures[0]

    again = merge_to_folder(recipe.model.name, [result.adapter], tmp_path / "in memory")
    assert again.saved_difference < 1e-3 < again.adapter_effect
    other = read_back(again.folder, task).state_dict()
    assert all(
        torch.equal(tensor, other[name])
        for name, tensor in merged.state_dict().items()
        if "pooler" not in name
    )

    if task in ("classification", "token-classification"):
        assert merged.config.id2label == result.model.config.id2label
        assert merged.config.label2id == {label: i for i, label in merged.config.id2label.items()}
    if task == "regression":
        assert merged.config.problem_type == "regression"
        assert merged.config.num_labels == 1
    if task == "embedding":
        texts = ["the cat is old", "red"]
        one, two = (embed(model, load_tokenizer(str(done.path)), texts) for model in (merged, result.model))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        return
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(done.path)})})
    if task == "dpo":
        return  # of a merged model the preference is its own reference
    assert evaluate(plain).scores == pytest.approx(evaluate(recipe, adapter=result.adapter).scores, abs=1e-4)


def test_a_decoder_becomes_a_classifier_that_knows_its_padding(
    make_task: MakeTask, decoder_folder: Path, tmp_path: Path
) -> None:
    recipe = make_task("classification", decoder_folder, kind_rows(18), train={"max_steps": 8})
    result = train(recipe)
    done = export(result.folder, "merged", out=tmp_path / "m")
    assert done.rounding is not None
    with safe_open(done.path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    merged = read_back(done.path, "classification")
    assert merged.config.pad_token_id == result.tokenizer.pad_token_id
    assert load_tokenizer(str(done.path)).pad_token == result.tokenizer.pad_token
    said = transformers.pipeline("text-classification", str(done.path))(["cat is old", "the very old elm"])
    rows = dict(result.tokenizer(["cat is old", "the very old elm"], return_tensors="pt", padding=True))
    rows.pop("token_type_ids", None)
    best = outputs(result.model, **rows).argmax(1).tolist()
    assert [one["label"] for one in said] == [result.model.config.id2label[i] for i in best]


def test_a_head_for_other_labels_is_replaced(
    make_task: MakeTask, encoder_folder: Path, tmp_path: Path
) -> None:
    config = BertConfig.from_pretrained(encoder_folder, num_labels=5)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "five")
    load_tokenizer(str(encoder_folder)).save_pretrained(tmp_path / "five")
    recipe = make_task("classification", tmp_path / "five", kind_rows(18), train={"max_steps": 8})
    result = train(recipe)
    done = export(result.folder, "merged", out=tmp_path / "m")
    assert done.rounding is not None
    merged = read_back(done.path, "classification")
    assert merged.classifier.weight.shape == (3, 32)
    torch.testing.assert_close(
        outputs(merged, input_ids=IDS), outputs(result.model, input_ids=IDS), rtol=1e-4, atol=1e-4
    )


def test_half_precision_and_shards(make_task: MakeTask, tmp_path: Path) -> None:
    """The head is written in the checkpoint's dtype, into its last file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    LlamaModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    recipe = make_task("classification", tmp_path / "base", kind_rows(18), train={"max_steps": 8})
    result = train(recipe)
    done = export(result.folder, "merged", out=tmp_path / "m")
    assert done.rounding is not None
    shards = sorted(file.name for file in done.path.glob("*.safetensors"))
    assert shards == sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    index = json.loads((done.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "score.weight" in index
    merged = read_back(done.path, "classification")
    assert merged.dtype is torch.bfloat16
    theirs, ours = (outputs(m, input_ids=IDS).float() for m in (merged, result.model))
    torch.testing.assert_close(theirs, ours, rtol=0.1, atol=0.1)


def test_a_vision_transformer_keeps_how_its_images_are_normalised(
    images: Callable[..., Recipe],
    vit: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = images(vit)
    result = train(recipe)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = outputs(result.model, pixel_values=pixels)
    done = export(result.folder, "merged", out=tmp_path / "streamed")
    assert done.difference is not None  # transformers 5 stores ViT by other names than it has in memory
    in_memory = merge_to_folder(str(vit), [result.adapter], tmp_path / "in memory")
    for folder in (done.path, in_memory.folder):
        merged = transformers.AutoModelForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(outputs(merged, pixel_values=pixels), expected, rtol=1e-4, atol=1e-4)
        assert merged.config.id2label == {0: "bar 0", 1: "bar 1", 2: "bar 2"}
        assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.5, 0.5]
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(done.path)})})
    assert evaluate(plain).scores == pytest.approx(evaluate(recipe, adapter=result.adapter).scores, abs=1e-4)


@pytest.mark.parametrize("classes", [3, 10])
def test_a_resnet_becomes_a_file_of_weights_like_its_base(
    images: Callable[..., Recipe],
    resnet: Path,  # noqa: F811
    classes: int,
    tmp_path: Path,
) -> None:
    result = train(images(resnet, classes, method="lora_c", targets="all-conv"))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = outputs(result.model, pixel_values=pixels)
    done = export(result.folder, "merged")
    assert done.path == result.folder / "adapter-merged"
    assert done.difference is not None
    assert done.difference < 1e-4
    file = done.path / resnet.name
    network, fresh = load_cifar_resnet(file)
    assert not fresh
    torch.testing.assert_close(outputs(network, pixel_values=pixels), expected, rtol=1e-4, atol=1e-4)
    assert load_file(file).keys() == load_file(resnet).keys()
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["labels"]) == [f"bar {i}" for i in range(classes)]
    again = load_image_classifier(find_image_model(str(file)), None).model
    assert torch.equal(outputs(again, pixel_values=pixels), outputs(network, pixel_values=pixels))


def test_of_several_adapters_each_is_merged_by_its_folder(decoder_folder: Path, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", colour_rows(12)))
    recipe = Recipe.from_mapping(
        {
            "model": str(decoder_folder),
            "adapters": [{"name": name, "r": 2, "data": {"train": file}} for name in ("one", "two")],
            "train": {"max_steps": 4, "batch_rows": 4, "lr": 1e-2},
            "output": str(tmp_path / "run"),
        }
    )
    result = train(recipe)
    with pytest.raises(
        ConfigError, match=r"holds 2 adapters: one, two. Name the folder of one of them: .*run/one"
    ):
        export(result.folder, "merged")
    for name in ("one", "two"):
        with lk.use(result.model, name):
            expected = outputs(result.model, input_ids=IDS)
        for place in (result.folder / name, result.folder / name / "adapter"):
            done = export(place, "merged", overwrite=True)
            assert done.path == result.folder / name / "adapter-merged"
            merged = read_back(done.path, "causal-lm")
            torch.testing.assert_close(outputs(merged, input_ids=IDS), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="holds no best/"):
        export(result.folder / "one", "merged", which="best")


def test_a_network_of_the_callers_own_is_merged_in_python(
    images: Callable[..., Recipe],
    vit: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = model, torch.nn.Linear(32, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.out(self.body(pixel_values).last_hidden_state[:, 0])  # type: ignore[no-any-return]

    recipe = images(Path("no such model"))
    data = recipe.data.model_copy(update={"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32})  # type: ignore[union-attr]
    result = train(recipe.model_copy(update={"data": data}), model=Own())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"network of your own.*lk\.merge"):
        export(result.folder, "merged", out=tmp_path / "m")


def test_what_cannot_be_one_model_is_refused(
    make_task: MakeTask, encoder_folder: Path, decoder_folder: Path, tmp_path: Path
) -> None:
    texts = train(make_task("classification", encoder_folder, kind_rows(18), "texts", train={"max_steps": 2}))
    tags = train(make_task("token-classification", encoder_folder, TAGGED, "tags", train={"max_steps": 2}))
    more = train(
        make_task("classification", encoder_folder, kind_rows(18), "more", train={"max_steps": 2, "lr": 5e-2})
    )
    base = str(encoder_folder)
    with pytest.raises(
        ConfigError, match=r"tells apart animal, colour, tree, and .* tells apart O, B-animal"
    ):
        merge_checkpoint(base, [texts.adapter, tags.adapter], tmp_path / "m")
    with pytest.raises(MergeError, match="Each of these adapters brings a head that the checkpoint has not"):
        merge_checkpoint(base, [texts.adapter, more.adapter], tmp_path / "m", weights=[0.5, 0.5])
    assert not (tmp_path / "m").exists()
    both = merge_to_folder(base, [texts.adapter, more.adapter], tmp_path / "m", weights=[0.5, 0.5])
    heads = [lk.read(r.adapter).tensors["classifier.weight"]["value"] for r in (texts, more)]
    found = read_back(both.folder, "classification").classifier.weight
    torch.testing.assert_close(found, (heads[0] + heads[1]) / 2, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_names_labels_and_brings_no_head_is_refused(
    make_task: MakeTask, encoder_folder: Path, tmp_path: Path
) -> None:
    result = train(make_task("classification", encoder_folder, kind_rows(18), train={"max_steps": 2}))
    state = lk.read(result.adapter)
    body = [path for path in state.tensors if not path.startswith("classifier")]
    spec = lk.AdapterSpec(
        {path: state.spec.methods[path] for path in body},
        {path: state.spec.shapes[path] for path in body},
        info={key: value for key, value in state.spec.info.items() if key != "peft"},
    )
    lk.save(lk.AdapterState(spec, {path: state.tensors[path] for path in body}), tmp_path / "headless")
    with pytest.raises(MergeError, match=r"has no classifier\.bias, classifier\.weight, and the adapter"):
        merge_checkpoint(str(encoder_folder), [tmp_path / "headless"], tmp_path / "m")


def test_a_file_of_weights_that_is_no_resnet(
    make_task: MakeTask, encoder_folder: Path, tmp_path: Path
) -> None:
    result = train(make_task("classification", encoder_folder, kind_rows(18), train={"max_steps": 2}))
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(lk.LorakitError, match="holds no ResNet for CIFAR"):
        merge_to_folder(str(tmp_path / "a.safetensors"), [result.adapter], tmp_path / "m")
    assert load_classifier(encoder_folder, ("a", "b")).fresh
