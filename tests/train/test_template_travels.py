"""The chat template goes along with an adapter: into its folder, back for scoring, and into merged models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.errors import AdapterFileError
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, evaluate, train
from lorakit.train.generation import generate
from lorakit.train.merging import merge_to_folder
from lorakit.train.recipe import GenerateSection
from tests.tiny_chat import TEMPLATE, write_rows

MakeRecipe = Callable[..., Recipe]
OWN = TEMPLATE.replace("<|im_start|>{{ m['role'] }}", "<|im_start|># {{ m['role'] }}").replace(
    "<|im_start|>assistant", "<|im_start|># assistant"
)


def with_own_template(recipe: MakeRecipe, tmp_path: Path, **train: Any) -> Recipe:
    path = tmp_path / "own.jinja"
    path.write_text(OWN, encoding="utf-8")
    made = recipe(**train)
    made.model.chat_template = path
    return made


def test_the_template_is_saved_and_used_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = with_own_template(recipe, tmp_path, max_steps=60, batch_rows=8)
    result = train(made)
    assert (result.adapter / "chat_template.jinja").read_text(encoding="utf-8") == OWN
    plain = recipe()  # does not name the template: the adapter knows it
    plain.evaluate.metrics = ["loss"]
    made.evaluate.metrics = ["loss"]
    theirs, mine = (
        evaluate(plain, adapter=result.adapter).scores,
        evaluate(made, adapter=result.adapter).scores,
    )
    assert theirs == pytest.approx(mine, rel=1e-6)
    tokenizer = load_tokenizer(plain.model.name)  # asked by the base's template instead, it does worse
    wrong = evaluate(plain, adapter=result.adapter, model=load_model(plain.model.name), tokenizer=tokenizer)
    assert wrong.scores["loss"] > mine["loss"] * 1.01
    (result.adapter / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with pytest.raises(AdapterFileError, match="not the template that the adapter was trained with"):
        evaluate(plain, adapter=result.adapter)


def test_a_merged_model_has_the_adapters_template(
    recipe: MakeRecipe, tmp_path: Path, tiny_folder: Path
) -> None:
    result = train(with_own_template(recipe, tmp_path, max_steps=1))
    merge_to_folder(str(tiny_folder), [result.adapter], tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OWN


def test_an_exported_adapter_has_the_template(recipe: MakeRecipe, tmp_path: Path) -> None:
    from lorakit.train.exporting import export

    result = train(with_own_template(recipe, tmp_path, max_steps=1))
    exported = export(result.folder, "native", out=tmp_path / "out").path
    assert (exported / "chat_template.jinja").read_text(encoding="utf-8") == OWN
    assert (exported / "rendering.json").is_file()


def test_the_best_adapter_has_the_template_too(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "r.jsonl", [ROWS["messages"]] * 2))
    sections = {"data": {"train": rows, "valid": rows}}
    made = with_own_template(recipe, tmp_path, max_steps=2, eval_every=1, sections=sections)
    result = train(made)
    assert (result.folder / "best" / "chat_template.jinja").read_text(encoding="utf-8") == OWN


def test_a_checkpoint_merged_on_the_disk_has_it_too(
    recipe: MakeRecipe, tmp_path: Path, tiny_folder: Path
) -> None:
    from lorakit.models.streaming_merge import merge_checkpoint

    result = train(with_own_template(recipe, tmp_path, max_steps=1))
    merge_checkpoint(tiny_folder, [result.adapter], tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OWN


def test_peft_reads_a_folder_with_a_template(recipe: MakeRecipe, tmp_path: Path, tiny_folder: Path) -> None:
    from peft import PeftModel

    result = train(recipe(max_steps=1))
    assert (result.adapter / "rendering.json").is_file()
    PeftModel.from_pretrained(load_model(tiny_folder), result.adapter)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "x", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "seq2seq": {"source": "a", "target": "b"},
    "generate": {"instruction": "a", "references": ["b", "c"]},
    "text": {"text": "a b c"},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_trains_and_is_scored(recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / "r.jsonl", [ROWS[name]] * 4)
    made = recipe(max_steps=3, sections={"data": {"train": str(file), "test": str(file)}})
    result = train(made)
    assert result.losses[-1] < result.losses[0]
    made.evaluate.metrics = ["loss"]
    assert evaluate(made, adapter=result.adapter).count == 4


def test_plain_text_has_no_answers_to_compare(recipe: MakeRecipe, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [ROWS["text"]])
    made = recipe(sections={"data": {"test": str(file)}})
    assert set(evaluate(made).scores) == {"loss", "perplexity"}
    made.evaluate.metrics = ["bleu"]
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1 is a plain text.*metrics: \[loss\]"):
        evaluate(made)


def test_tools_are_trained_and_asked_with(recipe: MakeRecipe, tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "tools.jinja"
    path.write_text(
        "{% if tools %}{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        "tools": tools,
    }
    file = write_rows(tmp_path / "r.jsonl", [row] * 4)
    made = recipe(max_steps=80, batch_rows=4, sections={"data": {"train": str(file), "test": str(file)}})
    made.model.chat_template = path
    result = train(made)
    (answer,) = generate(
        result.model,
        result.tokenizer,
        [row["messages"][:1]],
        GenerateSection(max_new_tokens=64),
        tools=[tools],
    )
    assert json.loads(answer) == {"name": "f", "arguments": {"x": 1}}
    assert set(evaluate(made, adapter=result.adapter).scores) == {"loss", "perplexity"}
    assert load_tokenizer(tiny_folder).chat_template == TEMPLATE
