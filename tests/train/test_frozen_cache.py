"""The cache of the frozen part: the same run, in which the lower blocks run once for each row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.attach.attachments import kept_by
from lorakit.errors import ConfigError
from lorakit.train import Recipe, TrainResult, train
from lorakit.train import frozen_cache as module
from lorakit.train.progress import Silent
from tests.tiny_chat import save_tiny_chat, tiny_model, tiny_tokenizer
from tests.train.test_trainer import StopAt, assert_equal

MakeRecipe = Callable[..., Recipe]
UPPER = {"r": 4, "alpha": 8, "dropout": 0.2, "targets": r"model[.]layers[.](2|3)[.].*_proj"}


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model of four blocks."""
    return save_tiny_chat(tmp_path_factory.mktemp("model") / "four", num_hidden_layers=4)


@pytest.fixture
def upper(recipe: MakeRecipe, four: Path) -> MakeRecipe:
    """A recipe that adapts the upper two of four blocks, with dropout on the adapter, over several epochs."""

    def make(output: str = "run", adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
        sections = {"model": str(four), "adapter": UPPER if adapter is None else adapter}
        return recipe(output, {**sections, **train.pop("sections", {})}, **{"max_steps": 13, **train})

    return make


def runs_of_the_first_block(model: Any) -> list[int]:
    """A list that grows by one entry whenever the first block is really run."""
    seen: list[int] = []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


def run(made: Recipe, four: Path, **options: Any) -> tuple[TrainResult, list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(four)
    seen = runs_of_the_first_block(model)
    return train(made, model=model, tokenizer=tiny_tokenizer(), **options), seen


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "settings",
    [
        {"batching": "packed", "fused": False},
        {"batching": "packed", "fused": True},
        {"batching": "padded"},
        {"batching": "packed", "fused": False, "accumulation": 2, "activation_checkpointing": True},
    ],
)
def test_the_run_is_the_same_and_the_lower_blocks_run_once(
    upper: MakeRecipe, four: Path, where: str, settings: dict[str, Any]
) -> None:
    plain, ran = run(upper("plain", **settings), four)
    cached, seen = run(upper("cached", cache_frozen=where, **settings), four)
    if settings.get("fused") is False:
        assert cached.losses == plain.losses
        assert_equal(cached.adapter, plain.adapter)
    else:  # what stands at padded places differs, which is masked, but not in the order of sums
        assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    batches = 13 * settings.get("accumulation", 1)
    # In place of the run's batches: six to fill it, two to look at the model, one to check that the loss is the same.
    assert len(seen) == len(ran) - batches + 9
    assert not (cached.folder / module.FILE).exists()
    assert not any("forward" in block.__dict__ for block in cached.model.model.layers)


def test_a_resumed_run_equals_the_uninterrupted_one(upper: MakeRecipe, four: Path) -> None:
    def make(name: str) -> Recipe:
        return upper(name, cache_frozen="memory", save_every=4)

    whole, _ = run(make("whole"), four)
    stopped, _ = run(make("parts"), four, progress=StopAt(7))
    assert stopped.stopped_by == "interrupt"
    resumed, _ = run(make("parts"), four, resume=True)
    assert resumed.losses == whole.losses
    assert_equal(resumed.adapter, whole.adapter)


def test_several_adapters_share_the_cache(upper: MakeRecipe, four: Path, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train.jsonl")}
    adapters = [{**UPPER, "name": "one", "data": data}, {**UPPER, "r": 2, "name": "two", "data": data}]

    def make(name: str, where: str) -> Recipe:
        made = upper(name)  # writes the rows
        plain = {key: value for key, value in made.plain().items() if key not in ("adapter", "data")}
        plain["train"] = {key: v for key, v in plain["train"].items() if v is not None}
        return Recipe.from_mapping(
            {**plain, "adapters": adapters, "train": {**plain["train"], "cache_frozen": where}}
        )

    plain, _ = run(make("plain", "none"), four)
    cached, _ = run(make("cached", "memory"), four)
    assert cached.losses == plain.losses
    for name in ("one", "two"):
        assert_equal(cached.adapters[name], plain.adapters[name])


def test_a_classifier_whose_head_alone_is_trained(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    rows = "text,label\n" + "".join(
        f"{'ab' * (i % 5 + 1)} {i},{'yes' if i % 3 else 'no'}\n" for i in range(20)
    )
    (tmp_path / "train.csv").write_text(rows)
    config = BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2, pad_token_id=2,
        label2id={"no": 0, "yes": 1}, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    results = []
    for where in ("none", "memory"):
        torch.manual_seed(0)
        made = Recipe.from_mapping(
            {
                "task": "classification",
                "model": "tiny",
                "adapter": {"method": "full", "targets": ["classifier"]},
                "data": {"train": str(tmp_path / "train.csv")},
                "train": {"epochs": 3, "batch_rows": 4, "cache_frozen": where},
                "output": str(tmp_path / where),
            }
        )
        model = BertForSequenceClassification(config)
        results.append(train(made, model=model, tokenizer=tiny_tokenizer()))
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)


# ---- what is told
def test_the_size_is_told_before_and_is_what_is_taken(
    upper: MakeRecipe, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    room = module._room

    def measured(*args: Any) -> torch.Tensor:
        made = room(*args)
        sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(module, "_room", measured)
    lines = Lines()
    run(upper(cache_frozen="memory"), four, progress=lines)
    (told,) = [line for line in lines.lines if line.startswith("frozen part")]
    assert "2 of 4 blocks" in told
    assert "24 rows" in told
    rows = next(line for line in lines.lines if line.startswith("train:"))
    tokens = int(rows.split(" tokens")[0].split()[-1].replace(",", ""))
    assert sizes == [tokens * 32 * 4]
    assert f"{sizes[0] / 1e9:.2f} GB in memory" in told
    assert not any("only once" in line for line in lines.lines)


def test_a_run_that_reads_each_row_once_is_told_that_it_gains_nothing(upper: MakeRecipe, four: Path) -> None:
    lines = Lines()
    run(upper(cache_frozen="memory", max_steps=3), four, progress=lines)
    assert any("only once" in line for line in lines.lines)


# ---- what is refused
def refused(made: Recipe, model: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        train(made, model=model, tokenizer=tiny_tokenizer())
    assert not kept_by(model) or not kept_by(model).adapters


def test_no_frozen_block_is_refused_with_a_pattern_that_works(upper: MakeRecipe) -> None:
    made = upper(adapter={"r": 2, "targets": "all-linear"}, cache_frozen="memory")
    with pytest.raises(ConfigError, match=r"first block, model\.layers\.0") as caught:
        train(made, model=tiny_model(num_hidden_layers=4), tokenizer=tiny_tokenizer())
    pattern = str(caught.value).split("targets: '")[1].split("'")[0]
    result = train(
        upper(adapter={"r": 2, "targets": pattern}, cache_frozen="memory"),
        model=tiny_model(num_hidden_layers=4),
        tokenizer=tiny_tokenizer(),
    )
    assert {path.split(".")[2] for path in lk.read(result.adapter).tensors} == {"2", "3"}


def test_adapted_embeddings_are_refused_by_name(upper: MakeRecipe) -> None:
    adapter = {"r": 2, "targets": [r"embed_tokens", "layers.3.mlp.up_proj"]}
    made = upper(adapter=adapter, cache_frozen="memory")
    refused(made, tiny_model(num_hidden_layers=4), r"model\.embed_tokens is adapted, before model\.layers")


def test_prompts_in_front_of_the_tokens_are_refused(upper: MakeRecipe) -> None:
    made = upper(adapter={"method": "prompt", "length": 2}, cache_frozen="memory")
    refused(made, tiny_model(num_hidden_layers=4), r"is adapted, before model\.layers")


def test_dropout_below_is_refused(upper: MakeRecipe) -> None:
    model = tiny_model(num_hidden_layers=4, attention_dropout=0.1)
    refused(upper(cache_frozen="memory"), model, "dropout in the attention")
    model = tiny_model(num_hidden_layers=4)
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(
        model.model.layers[1].mlp.act_fn, torch.nn.Dropout(1e-4)
    )
    refused(upper("other", cache_frozen="memory"), model, r"model\.layers\.1\.mlp\.act_fn\.1")


def test_dropout_above_is_no_reason(upper: MakeRecipe, four: Path) -> None:
    assert run(upper(adapter={**UPPER, "dropout": 0.5}, cache_frozen="memory"), four)[0].steps == 13


def test_a_model_that_hands_more_on_than_vectors_is_refused(upper: MakeRecipe) -> None:
    model = tiny_model(num_hidden_layers=4)
    told: list[torch.Tensor] = []

    def remember(module: Any, args: Any, output: Any) -> None:
        told[:] = [output]

    def add(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return output + told[0].mean()

    model.model.layers[0].mlp.register_forward_hook(remember)
    model.model.layers[3].register_forward_hook(add, with_kwargs=True)
    refused(upper(cache_frozen="memory"), model, "more than their vectors|does not run without")


def test_too_little_room_is_told_before_it_is_taken(
    upper: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory", lambda: (100, 50))
    refused(upper(cache_frozen="memory"), tiny_model(num_hidden_layers=4), "train.cache_frozen: disk")
    monkeypatch.setattr(module, "free_disk", lambda folder: 50)
    refused(
        upper("other", cache_frozen="disk"), tiny_model(num_hidden_layers=4), "Leave train.cache_frozen out"
    )
