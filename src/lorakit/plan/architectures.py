"""From a name to a model on the meta device: its classes, names and sizes, and not one number of its weights.

Nothing is fetched. A config is one that lorakit ships, that of a local folder, or a ``config.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lorakit.errors import ConfigError, MissingDependencyError, ModelError, listing, near_matches
from lorakit.plan.table_model import TableModel, table_model

PlanTask = Literal[
    "causal-lm",
    "seq2seq",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "feature-extraction",
]

AUTO_CLASS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
ALIASES = {"smollm2": "smollm2-135m", "t0_3b": "t0-3b", "llama-2": "llama-2-7b", "llama-3": "llama-3-8b"}
"""Other names of shipped configs; `smollm2` is that of the built-in model."""


@dataclass(frozen=True)
class Architecture:
    """A base model without its numbers.

    Attributes:
        name: As the user gave it.
        about: One line.
        source: Where the config is from.
        model: On the meta device, in ``train()`` mode as transformers makes it.
        notes: What was assumed about it.
    """

    name: str
    about: str
    source: str
    model: nn.Module
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether it has a forward pass that can be rehearsed."""
        return not isinstance(self.model, TableModel)

    @property
    def longest(self) -> int | None:
        """The most tokens that it has positions for; None when nothing says so."""
        config = getattr(self.model, "config", None)
        for key in ("max_position_embeddings", "n_positions"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return (
                    value - 2
                    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert")
                    else value
                )
        return None


def architectures() -> dict[str, str]:
    """The shipped configs: name to one line about each."""
    found = {}
    for entry in files("lorakit.plan").joinpath("architectures").iterdir():
        if entry.name.endswith(".json"):
            found[entry.name.removesuffix(".json")] = json.loads(entry.read_text(encoding="utf-8"))["about"]
    return dict(sorted(found.items()))


def architecture(
    name: str | Path, *, task: PlanTask | None = None, num_labels: int | None = None, attention: str = "sdpa"
) -> Architecture:
    """The model that a name means, on the meta device.

    Args:
        name: A shipped config (``"llama-2-7b"``, see `architectures`), a folder with a ``config.json``, or that file.
            An existing folder goes before a shipped name only when it is written as a path (``"./gpt2"``).
        task: What the model is for; by default the class that its config names.
        num_labels: Classes of a fresh classification head; with the task ``"sequence-classification"``.
        attention: transformers' ``attn_implementation``.

    Raises:
        ModelError: Nothing has that name, or the config is no model's.
        ConfigError: The task is unknown, or ``num_labels`` has no head to size.
        MissingDependencyError: transformers is not installed.
    """
    if task is not None and task not in AUTO_CLASS:
        raise ConfigError(
            f"There is no task {task!r}.{near_matches(str(task), get_args(PlanTask))} Known: {listing(AUTO_CLASS)}."
        )
    if num_labels is not None and (task != "sequence-classification" or num_labels < 1):
        raise ConfigError(
            f"num_labels={num_labels} is the size of the head of the task 'sequence-classification'."
        )
    shown, config, source = _config(name)
    about = str(
        config.pop("about", "")
        or ", ".join(config.get("architectures") or ())
        or config.get("model_type", "")
    )
    if "layers" in config and "model_type" not in config:
        if task is not None:
            raise ConfigError(f"{shown!r} is a table of layers, which has no task.")
        return Architecture(shown, about, source, table_model(config["layers"]))
    model = _transformers_model(shown, config, task, num_labels, attention).train()
    untied = config.get("tie_word_embeddings") is False and _untie(model)
    notes = (
        ("its config says that the head is not tied to the embedding, so both are counted",) if untied else ()
    )
    return Architecture(shown, about, source, model, notes)


def _config(name: str | Path) -> tuple[str, dict[str, Any], str]:
    """The name, the config, and where it is from."""
    text = str(name)
    shipped = architectures()
    known = ALIASES.get(text.lower(), text.lower())
    if isinstance(name, str) and known in shipped:
        entry = files("lorakit.plan") / "architectures" / f"{known}.json"
        return known, json.loads(entry.read_text(encoding="utf-8")), "a config that lorakit ships"
    path = Path(text).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise ModelError(f"{path} holds no config.json, so it does not say what model it is.")
        raise ModelError(
            f"There is no config {text!r}: no folder or file of that name, no shipped config."
            f"{near_matches(known, shipped)} Shipped: {listing(shipped, most=40)}. For any other model, download its "
            "config.json (a few kB) and name the file: nothing else of it is needed."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not ("model_type" in config or "layers" in config):
        raise ModelError(f"{file} is not a model's config: it has no model_type.")
    return text, config, str(file)


def _untie(model: nn.Module) -> bool:
    """Give the head a matrix of its own where transformers ties it against the config, as it does for every T5.

    The checkpoints of T5 v1.1 and mT5 hold two matrices, and loading one keeps both.
    """
    get_head, get_table = (getattr(model, f"get_{side}_embeddings", None) for side in ("output", "input"))
    head, table = get_head() if get_head else None, get_table() if get_table else None
    if head is None or table is None or head.weight is not table.weight:
        return False
    head.weight = nn.Parameter(torch.empty_like(head.weight))
    return True


def _transformers_model(
    name: str, config: dict[str, Any], task: PlanTask | None, num_labels: int | None, attention: str
) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Planning for a transformers model needs transformers. Install it with: pip install 'lorakit[train]'"
        ) from error
    values = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "dtype", "torch_dtype")
    }
    if num_labels is not None:
        values["num_labels"] = num_labels
    model_type = values.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"transformers cannot read the config of {name!r}: {str(error).splitlines()[0]}"
        ) from error
    named = [c for c in values.get("architectures") or () if hasattr(transformers, c)]
    if task is None and not named:
        raise ModelError(
            f"The config of {name!r} names no class of transformers (architectures: {values.get('architectures')}). "
            f"Say what the model is for with task: {listing(AUTO_CLASS)}."
        )
    try:
        with torch.device("meta"):
            for wanted in dict.fromkeys((attention, "eager")):  # not every architecture has every attention
                made._attn_implementation = wanted
                try:
                    if task is None:
                        return getattr(transformers, named[0])._from_config(made)
                    return getattr(transformers, AUTO_CLASS[task]).from_config(made)
                except ValueError as error:
                    if wanted == "eager" or "attention" not in str(error).lower():
                        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"transformers cannot build {name!r} from its config: {str(error).splitlines()[0]}"
        ) from error
    raise AssertionError("unreachable")
