"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import lorakit as lk
from lorakit.core import METHODS
from lorakit.errors import ConfigError, RecipeError
from lorakit.train.method_settings import attribute_docs, method_section
from lorakit.train.recipe import (
    AdapterSection,
    BuiltinData,
    EvaluateSection,
    FileData,
    GenerateSection,
    LabelledData,
    ModelSection,
    Recipe,
    TrainSection,
)
from lorakit.train.task_data import ImageData, PairData, TaggedData
from lorakit.train.task_sections import EmbeddingSection, PreferenceSection

SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "": (Recipe,),
    "model": (ModelSection,),
    "adapter": (AdapterSection,),
    "data": (BuiltinData, FileData, LabelledData, TaggedData, PairData, ImageData),
    "train": (TrainSection,),
    "generate": (GenerateSection,),
    "evaluate": (EvaluateSection,),
    "embedding": (EmbeddingSection,),
    "preference": (PreferenceSection,),
}

SMALLEST = """model: smollm2
data:
  builtin: text_to_sql
train:
  lr: 1e-5
  epochs: 2
output: runs/x
"""


def write(folder: Path, text: str = SMALLEST) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_smallest_recipe_is_read_with_numbers_as_numbers(tmp_path: Path) -> None:
    recipe = Recipe.from_file(write(tmp_path))
    assert recipe.model.name == "smollm2"
    assert recipe.train.lr == 1e-5
    assert recipe.adapter.adapter() == lk.LoRA()
    assert recipe.output == Path("runs/x")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("2E3", 2000.0), ("1.5e+2", 150.0), (".5", 0.5), ("3", 3.0)]
)
def test_every_way_to_write_a_number(tmp_path: Path, text: str, value: float) -> None:
    assert Recipe.from_file(write(tmp_path, SMALLEST.replace("1e-5", text))).train.lr == value


def test_typo_names_key_line_and_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml, line 6: 'train\.epoch' .* Did you mean 'epochs'"):
        Recipe.from_file(write(tmp_path, SMALLEST.replace("epochs", "epoch")))


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    text = SMALLEST.replace("epochs", "epoch").replace("1e-5", "fast").replace("output", "ouput")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(write(tmp_path, text))
    message = str(caught.value)
    for line in (
        "line 7: 'ouput' is not a key of a recipe. Did you mean 'output'?",
        "line 6: 'train.epoch' is not a key of a recipe. Did you mean 'epochs'",
        "line 5: 'train.lr' is wrong",
        "'output' is missing",
    ):
        assert line in message


def test_wrong_kind_of_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 5: 'train\.lr' is wrong: .*number.*got 'fast'"):
        Recipe.from_file(write(tmp_path, SMALLEST.replace("1e-5", "fast")))


def test_missing_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'output' is missing"):
        Recipe.from_file(write(tmp_path, SMALLEST.replace("output: runs/x\n", "")))


def test_a_key_twice_is_refused_where_yaml_would_take_the_last(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"line 7: 'train\.lr' stands here a second time \(first in line 5\)"
    ):
        Recipe.from_file(write(tmp_path, SMALLEST.replace("  epochs: 2\n", "  epochs: 2\n  lr: 3\n")))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "a: [1,\n", "model: {{\n"])
def test_no_mapping_or_no_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Recipe.from_file(write(tmp_path, text))


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(
        RecipeError, match=r"There is no recipe .*recipes\.yaml\. Did you mean 'recipe\.yaml'"
    ):
        Recipe.from_file(tmp_path / "recipes.yaml")


def test_a_folder_is_no_recipe_and_a_run_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder; name the recipe, a YAML file.$"):
        Recipe.from_file(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"It holds a run: .* and --adapter .*adapter"):
        Recipe.from_file(tmp_path)


def test_epochs_and_steps_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'train' makes no sense: epochs and max_steps"):
        Recipe.from_file(write(tmp_path), ["train.max_steps=3"])


# ---- overrides -----------------------------------------------------------------------------------------------------
def test_override_replaces_and_adds(tmp_path: Path) -> None:
    recipe = Recipe.from_file(
        write(tmp_path),
        ["train.lr=3e-4", "adapter.r=16", "model.dtype=bfloat16", "adapter.targets=[q_proj, v_proj]"],
    )
    assert recipe.train.lr == 3e-4
    assert recipe.adapter.adapter() == lk.LoRA(r=16)
    assert (recipe.model.name, recipe.model.dtype) == ("smollm2", "bfloat16")
    assert recipe.adapter.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3", "output.x=1", "train.lr=[1,"])
def test_override_in_the_wrong_form(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_file(write(tmp_path), [override])


# ---- paths and variables -------------------------------------------------------------------------------------------
def test_input_paths_start_at_the_recipe_and_output_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", "sub")
    text = "model: ./base\ndata:\n  train: ${WHERE}/a.jsonl\n  test: ${NOT_SET_ANYWHERE:-../b}.jsonl\noutput: out\n"
    recipe = Recipe.from_file(write(tmp_path, text))
    assert isinstance(recipe.data, FileData)
    assert recipe.data.train == tmp_path / "sub" / "a.jsonl"
    assert recipe.data.test == tmp_path / ".." / "b.jsonl"
    assert recipe.model.name == str(tmp_path / "base")
    assert recipe.output == Path("out")


def test_unset_variable_names_itself_and_the_line(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"line 7: 'output' needs the environment variable NOT_SET_ANYWHERE"
    ):
        Recipe.from_file(write(tmp_path, SMALLEST.replace("runs/x", "${NOT_SET_ANYWHERE}/x")))


# ---- adapters ------------------------------------------------------------------------------------------------------
def adapter(**settings: object) -> object:
    return Recipe.from_mapping(
        {"model": "m", "data": {"builtin": "text_to_sql"}, "output": "o", "adapter": settings}
    ).adapter.adapter()


def test_settings_of_a_method_stand_beside_its_name() -> None:
    assert adapter(
        method="lora", r=4, alpha=2, scaling="rslora", dropout=0.1, rank_pattern={"q_proj": 8}
    ) == lk.LoRA(r=4, alpha=2.0, scaling="rslora", dropout=0.1, rank_pattern={"q_proj": 8})
    assert adapter(method="dora", r=4) == lk.DoRA(lk.LoRA(r=4))
    assert adapter(method="bitfit") == lk.BitFit()
    assert adapter(method="full", targets=["lm_head"]) == lk.FullFineTuning()


def test_groups_give_several_methods() -> None:
    assert adapter(groups={"all-linear": {"r": 4}, "embed_tokens": {"method": "full"}}) == {
        "all-linear": lk.LoRA(r=4),
        "embed_tokens": lk.FullFineTuning(),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "lroa"}, "No method is called 'lroa'. Did you mean 'lora'"),
        ({"rnak": 3}, "'adapter.rnak' is not a key"),
        ({"dropuot": 0.1}, "Did you mean 'dropout'"),
        ({"r": 0}, "rank must be a whole number of at least 1"),
        ({"dropout": 1.5}, "dropout is a probability"),
        ({"init": "gausian"}, "No init is called 'gausian'. Did you mean 'gaussian'"),
        ({"method": "bitfit", "r": 4}, "'adapter.r' is not a key"),
        ({"groups": {"all-linear": {"rr": 4}}}, r"'adapter\.groups\.all-linear\.rr' is not a key"),
        ({"groups": {"all-linear": {"r": 4}}, "r": 8}, "move r into a group"),
        ({"groups": {}}, "groups is empty"),
        ({"method": 3}, "method is the name of a method"),
    ],
)
def test_wrong_adapters(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        adapter(**settings)


def test_file_data_needs_a_file() -> None:
    with pytest.raises(RecipeError, match="name at least one file"):
        Recipe.from_mapping({"model": "m", "data": {"format": "auto"}, "output": "o"})


def test_builtin_data_knows_no_file_keys() -> None:
    with pytest.raises(RecipeError, match=r"'data\.databases' is not a key"):
        Recipe.from_mapping(
            {"model": "m", "data": {"builtin": "text_to_sql", "databases": "x"}, "output": "o"}
        )


@pytest.mark.parametrize(
    "section",
    [
        {"method": "dora", "r": 2, "targets": ["q"]},
        {"groups": {"all-linear": {"r": 2}, "embed": {"method": "full"}}},
    ],
)
def test_plain_form_reads_back_equal(section: dict[str, object]) -> None:
    recipe = Recipe.from_mapping(
        {"model": "m", "data": {"train": "/a.jsonl"}, "output": "/o", "adapter": section}
    )
    again = Recipe.from_mapping(recipe.plain())
    assert again.plain() == recipe.plain()
    assert again.adapter.adapter() == recipe.adapter.adapter()


def test_recipe_error_is_a_config_error() -> None:
    assert issubclass(RecipeError, ConfigError)


# ---- documentation -------------------------------------------------------------------------------------------------
def documented() -> Iterator[tuple[str, str]]:
    """Dotted key and description of everything that a recipe may hold, apart from the methods' settings."""
    for prefix, models in SECTIONS.items():
        for model in models:
            for name, field in model.model_fields.items():
                yield f"{prefix}.{name}".lstrip("."), field.description or ""


@pytest.mark.parametrize(("key", "description"), list(documented()))
def test_every_key_is_described_here_and_in_the_guide(key: str, description: str) -> None:
    assert description.endswith(".")
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "training.md").read_text(encoding="utf-8")
    assert f"| `{key}` |" in guide
    assert description.replace("|", r"\|") in guide


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_section_whose_settings_are_described(name: str) -> None:
    section = method_section(name, AdapterSection)
    own = set(section.model_fields) - set(AdapterSection.model_fields)
    for setting in own:
        assert section.model_fields[setting].description, f"{name}.{setting}"


def test_attribute_docs_joins_lines_and_takes_those_of_the_base_class() -> None:
    class Thing:
        """A thing.

        Attributes:
            one: First line
                and the second.
            two: Another.

        Raises:
            three: Not one of them.
        """

    class Other(Thing):
        """Another thing.

        Attributes:
            two: Told anew.
            four: Its own.
        """

    assert attribute_docs(Thing) == {"one": "First line and the second.", "two": "Another."}
    assert attribute_docs(Other) == {
        "one": "First line and the second.",
        "two": "Told anew.",
        "four": "Its own.",
    }
