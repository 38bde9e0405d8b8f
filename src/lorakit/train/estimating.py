"""What a recipe will cost: the planner (`lorakit.plan`) asked with a recipe's words, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import LorakitError, ModelError
from lorakit.models import BUILTINS, cache_folder, load_tokenizer
from lorakit.models.fastest_dtype import matmul_rates
from lorakit.models.purpose import KIND_OF_TASK
from lorakit.plan import Architecture, Plan, architecture, architectures
from lorakit.plan.architectures import ALIASES, PlanTask
from lorakit.plan.counting import Counts
from lorakit.plan.memory import dtype_called
from lorakit.train.frozen_part import block_lists, lowest_block
from lorakit.train.recipe import Recipe
from lorakit.train.render import Rendered
from lorakit.train.task import Task
from lorakit.train.task_plan import Shape, adapters_of, step_flops, task_plan
from lorakit.train.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The others are planned as the model that their base's config names.
_PLANNED_AS_TRAINED: tuple[PlanTask, ...] = ("causal-lm", "seq2seq", "sequence-classification")
LONGEST_GUESS = 512


@dataclass(frozen=True)
class Estimate:
    """What a recipe will cost.

    Attributes:
        plan: Counts and memory.
        shape: Of the batches that it assumes.
        flops: Of one token of training, forward and backward; None where the model cannot be rehearsed.
        seconds: The least time that the run can take at the measured speed of this machine's matrix products; None
            where that is not known.
        why: Why the data was not read, or the time is not known; empty where all is known.
        adapters: What each of several adapters holds, by its name; empty for one adapter.
        frozen_cache: Bytes that ``train.cache_frozen`` keeps; None where it is not asked for, or not known.
    """

    plan: Plan
    shape: Shape
    flops: float | None
    seconds: float | None
    why: tuple[str, ...] = ()
    adapters: Mapping[str, Counts] = field(default_factory=dict)
    frozen_cache: int | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        training = self.plan.training
        return {
            **self.plan.plain(),
            "batch": dataclasses.asdict(self.shape),
            "largest": None if training is None else [list(term) for term in terms(self.plan)],
            "flops_per_token": self.flops,
            "at_least_seconds": self.seconds,
            "adapters": {
                name: {"trainable": counts.trainable, "stored": counts.stored}
                for name, counts in self.adapters.items()
            },
            "frozen_cache_bytes": self.frozen_cache,
            "not_known": list(self.why),
        }


def estimate(recipe: Recipe) -> Estimate:
    """Estimate a run. Nothing is downloaded: only a config is needed, and the data where the tokenizer is at hand.

    Raises:
        ModelError: No config of the model is at hand.
        ConfigError: A setting makes no sense for the model.
        TargetError: A target was not found.
    """
    task = task_of(recipe)
    config = config_of(recipe)
    shape, why = _shape(task, config)
    base = architecture_of(task, config)
    planned = task_plan(task, base, shape)
    run = planned.run
    flops = None
    if planned.training is not None:
        flops = step_flops(task, base, planned, shape) / shape.size
    cached, spared = _frozen_part(task, base, planned, shape)
    seconds = None
    if run.device == "cuda" and not torch.cuda.is_available():
        why = (*why, "the time: there is no GPU here to measure")
    elif flops is not None and shape.tokens is not None:
        rates = matmul_rates(run.device)
        rate = rates.bfloat16 if run.base_dtype == "bfloat16" else rates.float32
        seconds = (flops * shape.tokens - spared) / rate if rate else None
    adapters = adapters_of(task, base) if len(task.parts) > 1 else {}
    return Estimate(planned, shape, flops, seconds, why, adapters, cached)


def _frozen_part(task: Task, base: Architecture, planned: Plan, shape: Shape) -> tuple[int | None, int]:
    """The bytes of ``train.cache_frozen``, and the floating-point operations that it spares.

    Of these only the products with the weights of the frozen blocks are counted, so that the time stays a least time.
    """
    text = getattr(base.model, "config", None)
    if (
        task.recipe.train.cache_frozen == "none"
        or shape.distinct is None
        or shape.tokens is None
        or text is None
    ):
        return None, 0
    width = text.get_text_config().hidden_size
    paths = [site.path for site in planned.counts.sites]
    spared = 0
    for path, blocks in block_lists(base.model).items():
        lowest = lowest_block(path, paths, len(blocks))
        if lowest < len(blocks):
            frozen = [p.numel() for block in blocks[:lowest] for p in block.parameters() if p.dim() == 2]
            spared = 2 * sum(frozen) * max(0, shape.tokens - shape.distinct)
    size = torch.empty((), dtype=dtype_called(planned.run.base_dtype)).element_size()
    return shape.distinct * width * size, spared


def terms(planned: Plan) -> list[tuple[str, int]]:
    """The terms of the memory of training, the largest first."""
    training = planned.training
    assert training is not None
    found = {name: getattr(training, name) for name in training.__dataclass_fields__}
    return sorted(found.items(), key=lambda term: -term[1])


def config_of(recipe: Recipe) -> str | Path:
    """What `lorakit.plan.architecture` takes: a folder, a shipped name, or a hub id's config in the local cache.

    Raises:
        ModelError: No config is on this machine: which file to get.
    """
    name = recipe.model.name
    if Path(name).expanduser().is_dir() and name not in BUILTINS:
        return Path(name).expanduser()
    if ALIASES.get(name.lower(), name.lower()) in architectures():
        return name
    found = _cached(recipe, "config.json")
    if found is None:
        raise ModelError(
            f"The config of {name!r} is not on this machine, and an estimate fetches nothing. Download its config.json "
            "(a few kB) into a folder and estimate with --model.name FOLDER; or name a shipped config, see lorakit "
            "plan --models."
        )
    return found


def architecture_of(task: Task, config: str | Path) -> Architecture:
    """The model of a task on the meta device, with a head for as many labels as its rows have (2 if not read yet)."""
    trained = KIND_OF_TASK.get(task.recipe.task)
    kind = trained if trained in _PLANNED_AS_TRAINED else None
    labels = None
    if kind == "sequence-classification":
        labels = len(getattr(task, "labels", ())) or (1 if task.recipe.task == "regression" else 2)
    return architecture(config, task=kind, num_labels=labels)


def _shape(task: Task, config: str | Path) -> tuple[Shape, tuple[str, ...]]:
    """The largest batch, from the data where the tokenizer is at hand, else from the recipe."""
    try:
        return shape_of(task, task.rows(load_tokenizer(_tokenizer_of(task.recipe)), "train").rows), ()
    except (LorakitError, OSError) as error:
        reason = str(error).splitlines()[0]
    shape = guessed_shape(task)
    why = f"the rows, so {shape.rows} of {shape.length} tokens are taken for a batch: {reason}"
    return shape, (why,)


def guessed_shape(task: Task) -> Shape:
    """The largest batch as the recipe alone lets one think of it."""
    settings, parts = task.recipe.train, len(task.parts)
    length = min(settings.max_length, LONGEST_GUESS)
    count = settings.batch_rows or max(1, (settings.batch_tokens or 16 * length) // length)
    shares = (count,) * parts if parts > 1 else ()
    return Shape(count * parts, length, may_pack(task.recipe), shares=shares)


def may_pack(recipe: Recipe) -> bool:
    """Whether rows are taken to be packed; what the model itself allows is known when it is loaded."""
    return recipe.train.batching != "padded" and recipe.task == "causal-lm"


def shape_of(task: Task, rows: Sequence[Any]) -> Shape:
    """The largest batch of a run on some rows, and the whole of it."""
    packed = may_pack(task.recipe)
    return batch_shape(rows, task.batches(rows, not packed), task.recipe.train.accumulation, packed=packed)


def batch_shape(
    rows: Sequence[Any], batches: Sequence[Sequence[int]], accumulation: int, *, packed: bool
) -> Shape:
    """The largest of some batches, and all of them."""
    tokens = [_tokens([rows[i] for i in batch], packed) for batch in batches]
    members = [rows[i] for i in batches[tokens.index(max(tokens))]]
    texts = [text for row in members for text in row.texts]
    written = [row.written for row in members]
    length = -(-sum(text.length for text in texts) // len(texts)) if packed else max(t.length for t in texts)
    learnt, selected = _learnt(texts, written, length, packed)
    return Shape(
        rows=len(texts),
        length=length,
        packed=packed,
        learnt=learnt,
        tokens=sum(tokens),
        steps=-(-len(batches) // accumulation),
        measured=True,
        shares=_shares(members, rows),
        distinct=sum(rows[i].length for i in {i for batch in batches for i in batch}),
        selected=selected,
        padded=not packed and len({text.length for text in texts}) > 1,
        written=max(written),
    )


def _tokens(batch: Sequence[Any], packed: bool) -> int:
    """Tokens that the model reads and writes in a batch, padding counted."""
    read = [text.length for row in batch for text in row.texts]
    return sum(read) if packed else len(read) * max(read) + len(batch) * max(row.written for row in batch)


def _learnt(
    texts: Sequence[Any], written: Sequence[int], length: int, packed: bool
) -> tuple[float, float | None]:
    """The shares of positions that are learnt, and that are learnt in any row where these lie side by side."""
    if any(written):
        return sum(written) / (len(written) * max(written)), None
    if not all(isinstance(text, Rendered) for text in texts):
        return 1.0, None
    learnt = max(1, sum(text.learnt for text in texts)) / (len(texts) * length)
    places = set().union(*(text.learnt_at for text in texts))
    return min(1.0, learnt), None if packed else max(1, len(places)) / length


def _shares(batch: Sequence[Any], rows: Sequence[Any]) -> tuple[int, ...]:
    """How many rows of a batch each of several adapters learns from; empty where there is one."""
    if not hasattr(batch[0], "owner"):
        return ()
    return tuple(sum(row.owner == i for row in batch) for i in range(1 + max(row.owner for row in rows)))


def _tokenizer_of(recipe: Recipe) -> Path:
    """Where the tokenizer is on this machine.

    Raises:
        ModelError: Nowhere: it would have to be fetched.
    """
    name = recipe.model.name
    if name in BUILTINS:
        builtin = BUILTINS[name]
        there = sorted((cache_folder() / "models").glob(f"{name}-{builtin.version}-v*/config.json"))
        if not there:
            raise ModelError(f"{name!r} has not been fetched yet, so its tokenizer is not here.")
        return there[-1].parent
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    found = _cached(recipe, "tokenizer_config.json")
    if found is None:
        raise ModelError(f"the tokenizer of {name!r} is not on this machine.")
    return found.parent


def _cached(recipe: Recipe, file: str) -> Path | None:
    """A file of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(recipe.model.name, file, revision=recipe.model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def advice(planned: Plan) -> list[str]:
    """What to change for less memory, what helps most going first; each with the recipe's own key."""
    training, run = planned.training, planned.run
    if training is None:
        return []
    ways: list[tuple[int, str]] = []
    held = planned.weights
    if run.storage == "dense":
        saved = training.weights - training.weights * 5 // (8 * (4 if run.base_dtype == "float32" else 2))
        ways.append((saved, "model.quantize: nf4 keeps the linear layers in four bits"))
    if run.base_dtype == "float32":
        ways.append(
            (
                held.dense // 2 + training.activations // 2,
                "model.dtype: bfloat16 halves weights and activations (how fast it is here: lorakit doctor)",
            )
        )
    if run.batch > 1:
        ways.append(
            (
                training.activations // 2,
                f"half of train.batch_rows with train.accumulation: {2 * run.accumulation} learns the same with about "
                "half of the activations",
            )
        )
    if not run.checkpointing:
        ways.append(
            (
                training.activations * 2 // 3,
                "train.activation_checkpointing: true keeps the borders of layers only",
            )
        )
    ways.append((training.activations // 4, "a lower train.max_length leaves out, or cuts, the longest rows"))
    small = training.adapter + training.gradients + training.optimizer
    ways.append((small // 2, "adapter.r: half of it halves the adapter, its gradients and the optimizer"))
    return [text for _, text in sorted(ways, key=lambda way: -way[0])]


def live_architecture(model: PreTrainedModel) -> Architecture:
    """The architecture of a model that is loaded, anew on the meta device."""
    with torch.device("meta"):
        made = type(model)._from_config(model.config)
    return Architecture(type(model).__name__, "", "the loaded model", made.train())
