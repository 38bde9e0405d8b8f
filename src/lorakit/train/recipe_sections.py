"""The sections of a recipe that every task has: the model, the adapter, training, writing, scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from lorakit.core import Method
from lorakit.errors import ConfigError
from lorakit.train.data_sections import DataSection
from lorakit.train.method_settings import MethodSection, method_section
from lorakit.train.sections import InputPath, Section

Targets = str | list[str]
TaskName = Literal[
    "causal-lm", "seq2seq", "classification", "regression", "token-classification", "embedding", "dpo",
    "image-classification",
]  # fmt: skip
Metric = Literal[
    "execution_accuracy", "exact_match", "bleu", "nist", "loss", "accuracy", "macro_f1", "entity_f1", "pearson",
    "spearman", "mean_squared_error", "mean_absolute_error", "recall_at_1", "recall_at_10", "mrr", "reward_accuracy",
    "reward_margin",
]  # fmt: skip
METRICS: dict[TaskName, tuple[Metric, ...]] = {
    "causal-lm": ("execution_accuracy", "exact_match", "bleu", "nist", "loss"),
    "seq2seq": ("exact_match", "bleu", "nist", "loss"),
    "classification": ("accuracy", "macro_f1", "loss"),
    "regression": ("pearson", "spearman", "mean_squared_error", "mean_absolute_error"),
    "token-classification": ("accuracy", "macro_f1", "entity_f1", "loss"),
    "embedding": ("recall_at_1", "recall_at_10", "mrr", "pearson", "spearman"),
    "dpo": ("reward_accuracy", "reward_margin", "loss"),
    "image-classification": ("accuracy", "macro_f1", "loss"),
}

BESIDE_GROUPS = ("name", "exclude", "start_batches", "loftq_iterations")


def choose_section(value: Any, base: type[MethodSection], context: Mapping[str, Any] | None = None) -> Any:
    """Validate a mapping by the section of the method that it names.

    Args:
        value: A mapping, or anything else, which is given back as it is.
        base: What the section is, beside the settings of the method.
        context: As for pydantic.
    """
    if not isinstance(value, Mapping):
        return value
    name, inner = value.get("method", "lora"), value.get("inner")
    if not isinstance(name, str):
        raise ConfigError(f"method is the name of a method; got {name!r}.")
    section = method_section(name, base, inner if isinstance(inner, str) else None)
    return section.model_validate(value, context=context)


def _choose_group(value: Any, info: ValidationInfo) -> Any:
    return choose_section(value, MethodSection, info.context)


class ModelSection(Section):
    """The base model. A plain string in the recipe is its name."""

    name: str = Field(description="A folder, a built-in name (`smollm2`), or a hub id (`org/name`).")
    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of the base weights; `auto` is float32 on a CPU, the checkpoint's own on an accelerator. "
        "`fastest` is bfloat16 where this machine multiplies it faster than float32, which is measured once.",
    )
    device: str | None = Field(
        default=None, description="`cpu`, `cuda`, ...; by default CUDA if there is one."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    chat_template: InputPath | None = Field(
        default=None,
        description="Jinja file to render conversations with, in place of the tokenizer's own template.",
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Keep the weights of the linear layers in four bits (`nf4`, QLoRA) or eight (`int8`); heads stay "
        "dense.",
    )


class AdapterSection(MethodSection):
    """What is trained. The settings of the method stand beside these keys."""

    name: str = Field(default="default", description="The adapter's name on the model.")
    targets: Targets | None = Field(
        default=None,
        description="What to adapt: a preset (`all-linear`), a regular expression for whole paths, or a list of "
        "names. By default what the method says.",
    )
    exclude: Targets | None = Field(
        default=None, description="What to leave out of `targets`, in the same form."
    )
    start_batches: int = Field(
        default=8,
        ge=1,
        description="First batches of the training data, on which the starts `eva` and `lora_ga` are computed.",
    )
    loftq_iterations: int = Field(
        default=0,
        ge=0,
        description="LoftQ: with `model.quantize`, start where base and adapter together are nearest to the old "
        "weights, found in so many turns (5 is usual); only the adapted layers are quantised. 0 for none.",
    )
    groups: dict[str, Annotated[SerializeAsAny[MethodSection], BeforeValidator(_choose_group)]] | None = (
        Field(
            default=None,
            description="Several methods in one adapter: a mapping from a target (as in `targets`) to a method "
            "with its settings. Stands in place of `method`, its settings and `targets`.",
        )
    )

    @model_validator(mode="after")
    def _check(self) -> AdapterSection:
        if self.groups is not None:
            beside = self.model_fields_set - {*BESIDE_GROUPS, "groups", "data", "lr"}
            if beside:
                raise ConfigError(
                    f"groups names the methods and targets itself: move {', '.join(sorted(beside))} into a group."
                )
            if not self.groups:
                raise ConfigError("groups is empty: name at least one target with its method.")
        self.adapter()
        return self

    def adapter(self) -> Method | dict[str, Method]:
        """What `lorakit.attach` takes: a method, or a mapping from targets to methods."""
        if self.groups is None:
            return self.build()
        return {key: group.build() for key, group in self.groups.items()}

    def methods(self) -> list[Method]:
        """The methods of the adapter, whatever their targets."""
        return [self.build()] if self.groups is None else [group.build() for group in self.groups.values()]


class TrainSection(Section):
    """The optimizer, the batches, and how long."""

    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the data; 3 if neither this nor `max_steps` is given."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps, in place of `epochs`.")
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Stop cleanly after this time, whatever is left; the learning rate falls so as to be at its end "
        "by then.",
    )
    batch_rows: int | None = Field(
        default=None, ge=1, description="Rows in a batch; 16 if neither this nor `batch_tokens` is given."
    )
    batch_tokens: int | None = Field(
        default=None, ge=1, description="Tokens in a batch, as many rows as fit; with `batch_rows` both hold."
    )
    accumulation: int = Field(
        default=1, ge=1, description="Batches in an optimizer step; the gradient is that of one large batch."
    )
    batching: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="`packed`: rows end to end, each attending to itself, no padding. `padded`: rows of like "
        "length side by side. `auto` packs where a probe of the model shows that it is exact.",
    )
    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup: float = Field(
        default=0.03,
        ge=0,
        description="Share of the steps (below 1), or number of steps (from 1), with a rising rate.",
    )
    lora_plus_ratio: float = Field(
        default=1.0,
        gt=0,
        description="LoRA+: the learning rate of `B` divided by that of `A`; 16 is a first try. 1 is plain AdamW.",
    )
    fast: list[str] = Field(
        default_factory=lambda: ["B"],
        description="LoRA+: roles of the parameters that learn faster by that ratio (`A`, `B`, `magnitude`, `bias`, "
        "`copy`); `official` is `B` and every vector, as in the authors' code.",
    )
    embedding_lr: float | None = Field(
        default=None, gt=0, description="Learning rate of adapted embeddings; by default that of the rest."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, on matrices only.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradients are scaled down to this norm; 0 for never."
    )
    max_length: int = Field(default=1024, ge=2, description="Most tokens of a row.")
    overlong: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What to do with a longer row; how many there were is always said."
    )
    seed: int = Field(default=0, description="For the three seeds below.")
    init_seed: int | None = Field(default=None, description="Of the adapter's first values.")
    data_seed: int | None = Field(default=None, description="Of the order of the rows.")
    dropout_seed: int | None = Field(default=None, description="Of dropout.")
    log_every: int = Field(default=10, ge=1, description="Steps between lines of `metrics.jsonl`.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between losses on the valid split; by default at the end."
    )
    keep_best: str = Field(
        default="auto",
        description="What on the valid split tells the best adapter, which is kept in `best/`: `valid_loss`, "
        "`valid_accuracy`, or another that the task measures. `auto` is `valid_loss` where `eval_every` is set; "
        "`none` keeps the last adapter only.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop early, after so many measurements in a row that were not better than the best before.",
    )
    min_improvement: float = Field(
        default=0.0, ge=0, description="By how much a measurement must be better to count for `patience`."
    )
    save_every: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; by default none but on Ctrl-C."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Older checkpoints are removed.")
    activation_checkpointing: bool | Literal["auto"] = Field(
        default=False,
        description="Less memory for about half as much time again; `auto` where a step would not fit without it.",
    )
    fused: bool = Field(
        default=True,
        description="Run norms, gates and attention of decoders like Llama by compiled code that is faster and keeps "
        "less, where it is built and gives the same.",
    )
    cache_frozen: Literal["none", "memory", "disk"] = Field(
        default="none",
        description="Where only upper blocks are adapted: run the blocks below them once for each row, and keep what "
        "they give in `memory` or in a file on `disk`. The losses are the same.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the model's blocks with `torch.compile`: the first steps take minutes, the others less.",
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default_factory=list,
        description="Trackers that are told what `metrics.jsonl` is told; each is a package of its own.",
    )

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("epochs and max_steps say the same thing: give one of them.")
        if self.fast != ["B"] and self.lora_plus_ratio == 1:
            raise ConfigError(
                "fast says what learns faster, but by no ratio: set lora_plus_ratio, such as 16."
            )
        return self

    def seed_of(self, what: Literal["init", "data", "dropout"]) -> int:
        """The seed of one of the three draws: its own where it is set, else `seed`."""
        own: int | None = getattr(self, f"{what}_seed")
        return self.seed if own is None else own


class GenerateSection(Section):
    """How answers are written when scoring."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer.")
    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the likeliest token each time; above, tokens are drawn."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the likeliest tokens that hold this share."
    )
    top_k: int = Field(default=0, ge=0, description="Draw from so many likeliest tokens; 0 for all.")
    num_beams: int = Field(default=1, ge=1, description="Beam search over so many answers; 1 is greedy.")
    length_penalty: float = Field(
        default=1.0, description="Beam search: above 0 longer answers are favoured, below 0 shorter ones."
    )
    no_repeat_ngram_size: int = Field(
        default=0, ge=0, description="No answer repeats so many tokens in a row; 0 for no such rule."
    )
    batch_rows: int = Field(default=16, ge=1, description="Prompts answered at a time.")
    seed: int = Field(default=0, description="Of the drawing.")


class EvaluateSection(Section):
    """What is measured."""

    metrics: list[Metric] | None = Field(
        default=None,
        description="Of `execution_accuracy`, `exact_match`, `bleu`, `nist`, `loss`; to classify, of `accuracy`, "
        "`macro_f1`, `loss`; for other tasks of what their pages say. By default what fits the data.",
    )
    limit: int | None = Field(default=None, ge=1, description="Score only the first examples of the split.")


class LearnerSection(AdapterSection):
    """One of several adapters that learn in one pass."""

    data: SerializeAsAny[DataSection] = Field(description="The examples that it learns, as under `data`.")
    lr: float | None = Field(default=None, gt=0, description="Its learning rate, in place of `train.lr`.")
