"""A recipe: everything about a run in one checked object. `Recipe.from_file` reads it from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from lorakit.errors import ConfigError
from lorakit.train.data_sections import BuiltinData, DataSection, FileData, LabelledData
from lorakit.train.recipe_rules import check_rules
from lorakit.train.recipe_sections import (
    BESIDE_GROUPS,
    METRICS,
    AdapterSection,
    EvaluateSection,
    GenerateSection,
    LearnerSection,
    Metric,
    ModelSection,
    Targets,
    TaskName,
    TrainSection,
    choose_section,
)
from lorakit.train.sections import Section
from lorakit.train.task_data import ImageData, PairData, TaggedData
from lorakit.train.task_sections import EmbeddingSection, PreferenceSection

__all__ = [
    "AdapterSection",
    "EvaluateSection",
    "GenerateSection",
    "LearnerSection",
    "Metric",
    "ModelSection",
    "Recipe",
    "Targets",
    "TaskName",
    "TrainSection",
]

_PACKED: tuple[TaskName, ...] = ("causal-lm", "dpo")
_DATA: dict[str, type[DataSection]] = {
    "classification": LabelledData,
    "regression": LabelledData,
    "token-classification": TaggedData,
    "embedding": PairData,
    "image-classification": ImageData,
}


def _choose_adapter(value: Any, info: ValidationInfo) -> Any:
    return choose_section(value, AdapterSection, info.context)


def _choose_data(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind = _DATA.get(info.data.get("task", ""), BuiltinData if "builtin" in value else FileData)
    return kind.model_validate(value, context=info.context)


def _choose_adapters(value: Any, info: ValidationInfo) -> Any:
    """Each of several adapters with its own data."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    made = []
    for entry in value:
        if isinstance(entry, Mapping) and "data" in entry:
            entry = {**entry, "data": _choose_data(entry["data"], info)}
        made.append(choose_section(entry, LearnerSection, info.context))
    return made


def _named_model(value: Any, info: ValidationInfo) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    folder = (info.context or {}).get("folder")
    if (
        folder is not None
        and isinstance(value, Mapping)
        and str(value.get("name", "")).startswith(("./", "../"))
    ):
        return {**value, "name": str(Path(folder, str(value["name"])))}
    return value


class Recipe(Section):
    """Everything about a run."""

    task: TaskName = Field(
        default="causal-lm",
        description="`causal-lm`: to write. `seq2seq`: to write with an encoder and a decoder. `classification`: to "
        "tell labels apart, with a trained head. `regression`: to give a number. `token-classification`: a label for "
        "each word. `embedding`: vectors of texts. `dpo`: to prefer one answer to another. `image-classification`: to "
        "tell pictures apart.",
    )
    model: Annotated[ModelSection, BeforeValidator(_named_model)] = Field(description="The base model.")
    adapter: Annotated[SerializeAsAny[AdapterSection], BeforeValidator(_choose_adapter)] = Field(
        default_factory=lambda: choose_section({}, AdapterSection), description="What is trained."
    )
    data: Annotated[SerializeAsAny[DataSection], BeforeValidator(_choose_data)] = Field(
        description="The examples."
    )
    adapters: (
        Annotated[
            list[SerializeAsAny[LearnerSection]], BeforeValidator(_choose_adapters), Field(min_length=1)
        ]
        | None
    ) = Field(
        default=None,
        description="Several adapters that learn in one pass over one base, in place of `adapter` and `data`: each "
        "with its `name`, method and settings, targets, its own `data` and perhaps its `lr`.",
    )
    embedding: EmbeddingSection | None = Field(
        default=None, description="`task: embedding`: pooling and loss."
    )
    preference: PreferenceSection | None = Field(default=None, description="`task: dpo`: beta and smoothing.")
    train: TrainSection = Field(default_factory=TrainSection, description="How it is trained.")
    generate: GenerateSection = Field(default_factory=GenerateSection, description="How answers are written.")
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description="What is measured.")
    output: Path = Field(description="Folder of the results, relative to the current folder.")

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        check_rules(self)
        if self.adapter.loftq_iterations and self.model.quantize is None:
            raise ConfigError(
                "adapter.loftq_iterations makes up for quantising: set model.quantize to nf4 or int8."
            )
        strange = [m for m in self.evaluate.metrics or () if m not in METRICS[self.task]]
        if strange:
            raise ConfigError(
                f"{strange[0]} is no metric for task: {self.task}; there are {', '.join(METRICS[self.task])}."
            )
        if self.task not in _PACKED and self.train.batching == "packed":
            raise ConfigError(
                f"train.batching: packed is for {' and '.join(_PACKED)}; with task: {self.task} rows are padded."
            )
        self._check_sections()
        if self.adapters is not None:
            self._check_adapters(self.adapters)
        return self

    @model_validator(mode="before")
    @classmethod
    def _first_data(cls, value: Any) -> Any:
        """With several adapters the first one's data stand for all that one run has only once."""
        if isinstance(value, Mapping) and isinstance(value.get("adapters"), Sequence) and value["adapters"]:
            if "data" in value and value["data"] != _data_in(value["adapters"][0]):
                raise ConfigError("with adapters each one has its own data: move data into them.")
            if _data_in(value["adapters"][0]) is not None:
                return {**value, "data": _data_in(value["adapters"][0])}
        return value

    def _check_sections(self) -> None:
        own: dict[str, tuple[TaskName, type[Section]]] = {
            "embedding": ("embedding", EmbeddingSection),
            "preference": ("dpo", PreferenceSection),
        }
        for key, (task, section) in own.items():
            if self.task == task and getattr(self, key) is None:
                setattr(self, key, section())
            elif self.task != task and getattr(self, key) is not None:
                raise ConfigError(f"{key} is for task: {task}; the task here is {self.task}.")

    def _check_adapters(self, adapters: Sequence[LearnerSection]) -> None:
        names = [adapter.name for adapter in adapters]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"two of the adapters are called {twice[0]!r}: give each a name of its own.")
        if "adapter" in self.model_fields_set:
            raise ConfigError("adapter and adapters say the same thing: give one of them.")
        if self.task not in ("causal-lm", "seq2seq"):
            raise ConfigError(
                f"adapters is for task: causal-lm and seq2seq; with task: {self.task} train them one by one."
            )
        if any(adapter.loftq_iterations for adapter in adapters):
            raise ConfigError("LoftQ changes the base for one adapter, so it cannot serve several.")

    def parts(self) -> list[Recipe]:
        """A recipe for each adapter alone, with its own data, rate and output folder; with one adapter this one."""
        if self.adapters is None:
            return [self]
        return [
            self.model_copy(
                update={
                    "adapter": adapter,
                    "adapters": None,
                    "data": adapter.data,
                    "train": self.train.model_copy(update={"lr": adapter.lr or self.train.lr}),
                    "output": self.output / adapter.name,
                }
            )
            for adapter in self.adapters
        ]

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            path: A YAML file. ``${NAME}`` and ``${NAME:-default}`` in its strings are environment variables.
            overrides: Settings that replace those of the file, as ``"train.lr=1e-4"``.

        Raises:
            RecipeError: The file cannot be read, or a key or value is wrong; the message names key and line.
        """
        from lorakit.train.recipe_file import read_recipe

        return read_recipe(path, overrides)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], folder: str | Path | None = None) -> Recipe:
        """A recipe from plain data, checked as a file is.

        Args:
            values: What the YAML file would hold.
            folder: Where relative input paths start; by default the current folder.

        Raises:
            RecipeError: A key or value is wrong.
        """
        from lorakit.train.recipe_file import check_recipe

        return check_recipe(values, {}, None if folder is None else Path(folder), "recipe")

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON can hold it, every default written out."""
        plain = self.model_dump(mode="json")
        if self.adapter.groups is not None:  # which stand in place of one method
            plain["adapter"] = {key: plain["adapter"][key] for key in (*BESIDE_GROUPS, "groups")}
        if self.adapters is not None:  # which stand in place of one adapter
            del plain["adapter"], plain["data"]
            for i, adapter in enumerate(self.adapters):
                if adapter.groups is not None:
                    keys = (*BESIDE_GROUPS, "groups", "data", "lr")
                    plain["adapters"][i] = {key: plain["adapters"][i][key] for key in keys}
        return plain


def _data_in(adapter: Any) -> Any:
    return adapter.get("data") if isinstance(adapter, Mapping) else getattr(adapter, "data", None)
