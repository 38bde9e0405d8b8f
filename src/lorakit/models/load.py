"""Load a base model and its tokenizer by name, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError

from lorakit.errors import ConfigError, MissingDependencyError, ModelError, listing, near_matches
from lorakit.models.builtin import BUILTINS
from lorakit.models.fastest_dtype import fastest_dtype
from lorakit.models.resolve import ResolvedModel, resolve
from lorakit.plan.architectures import AUTO_CLASS, PlanTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = PlanTask
HEADED = ("sequence-classification", "token-classification", "image-classification")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path | ResolvedModel,
    *,
    task: Task = "causal-lm",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a base model, in `eval()` mode.

    Args:
        name: A folder, a built-in name, a hub id "org/name", or what `resolve` returned.
        task: What the model is for; picks the head.
        dtype: "float32", "bfloat16", "float16" or a torch dtype. "auto" is float32 on a CPU, where half precision is
            mostly slower, and the checkpoint's own dtype on an accelerator. "fastest" is what `fastest_dtype` measures.
        device: Where to put the model; None is CUDA if there is a device, else the CPU.
        num_labels: Classes of the new classification head (1 is regression); only for
            "sequence-classification". None keeps the checkpoint's.
        revision: A branch, tag or commit of a hub id.

    Raises:
        ModelError: The model cannot be found or read, or lacks weights that the task needs.
        ConfigError: An option that makes no sense, alone or with the others.
        MissingDependencyError: transformers is not installed.
    """
    if task not in AUTO_CLASS:
        raise ConfigError(f"There is no task {task!r}.{near_matches(str(task), get_args(Task))} {_tasks()}")
    if num_labels is not None and task != "sequence-classification":
        raise ConfigError(
            f"num_labels={num_labels} was given for the task {task!r}; it sets the head of 'sequence-classification'."
        )
    if num_labels is not None and num_labels < 1:
        raise ConfigError(f"num_labels must be at least 1, not {num_labels}.")
    resolved = resolved_name(name, revision)
    options = {} if num_labels is None else {"num_labels": num_labels}
    model, _ = read_model(resolved, task, dtype, device, revision, options)
    return model


def read_model(
    resolved: ResolvedModel,
    task: Task,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, set[str]]:
    """A model in ``eval()`` mode, and the names of its parameters that the checkpoint does not hold as they are needed.

    Args:
        resolved: Where it is.
        task: What the model is for.
        dtype: As for `load_model`.
        device: As for `load_model`.
        revision: As for `load_model`.
        options: What else transformers is told.

    Raises:
        ModelError: It cannot be read, or lacks weights that are not new by nature.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    transformers = _transformers()
    options = {"dtype": compute_dtype(dtype, where), **origin(resolved, revision), **options}
    auto_class = getattr(transformers, AUTO_CLASS[task])
    try:
        model, info = auto_class.from_pretrained(resolved.location, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(_unreadable(resolved, f"a model for {task!r}", error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{resolved.name!r} is an adapter, which transformers put onto its base model by itself. "
            "Name the base model here and load the adapter onto it."
        )
    _refuse_missing_weights(model, set(info["missing_keys"]), task, resolved)
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    if task == "sequence-classification" and model.config.pad_token_id is None:
        # Decoders classify at the last token that is no padding, so they must know the padding.
        model.config.pad_token_id = load_tokenizer(resolved, revision=revision).pad_token_id
    return model.to(where), fresh


def has_encoder_and_decoder(resolved: ResolvedModel, revision: str | None = None) -> bool:
    """Whether a model reads with an encoder and writes with a decoder, as T5 and BART do; its config says so.

    Raises:
        ModelError: There is no config that can be read.
    """
    try:
        config = _transformers().AutoConfig.from_pretrained(resolved.location, **origin(resolved, revision))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreadable(resolved, "a config", error)) from error
    return bool(getattr(config, "is_encoder_decoder", False))


def load_tokenizer(
    name: str | Path | ResolvedModel, *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer, always with a pad token.

    A tokenizer without one (GPT-2, Llama) pads with its unknown token if that differs from the end token, else with
    the end token; the vocabulary is never enlarged. Where pad and end token are the same (as SmolLM2's makers chose),
    mask padding in the labels by the attention mask and not by token id, or the model unlearns to stop.

    Args:
        name: As for `load_model`.
        revision: A branch, tag or commit of a hub id.

    Raises:
        ModelError: The model cannot be found, or holds no readable tokenizer.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers()
    resolved = resolved_name(name, revision)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            resolved.location, **origin(resolved, revision)
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(_unreadable(resolved, "a tokenizer", error)) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # What transformers makes up, without a word, where a model comes without its tokenizer's files.
        raise ModelError(
            f"{resolved.name!r} comes without a tokenizer's vocabulary (tokenizer.json or the like). "
            "Copy the tokenizer's files of the original model beside its config.json."
        )
    if tokenizer.pad_token is None:
        unknown, end = tokenizer.unk_token, tokenizer.eos_token
        if unknown is None and end is None:
            raise ModelError(
                f"The tokenizer of {resolved.name!r} has neither a pad, an unknown nor an end token to pad with. "
                "Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = unknown if unknown is not None else end
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Loading base models needs transformers. Install it with: pip install 'lorakit[train]'"
        ) from error
    return transformers


def resolved_name(name: str | Path | ResolvedModel, revision: str | None) -> ResolvedModel:
    """Where a model is, once it is clear that the revision means something there.

    Raises:
        ConfigError: A revision of a local folder.
    """
    resolved = name if isinstance(name, ResolvedModel) else resolve(name)
    if revision is not None and resolved.kind != "hub":
        raise ConfigError(
            f"revision={revision!r} was given, but {resolved.name!r} is a {resolved.kind}, not a hub id."
        )
    return resolved


def origin(resolved: ResolvedModel, revision: str | None) -> dict[str, Any]:
    """Folders never touch the network; a hub id may name a revision."""
    if resolved.kind != "hub":
        return {"local_files_only": True}
    return {} if revision is None else {"revision": revision}


def compute_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """What a dtype by name means on a device; ``"auto"`` on an accelerator is the checkpoint's own.

    Raises:
        ConfigError: There is no such dtype, or it is no floating-point one.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ConfigError(f"A model cannot be loaded as {dtype}: it must be a floating-point dtype.")
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype == "fastest":
        return fastest_dtype(device)
    if dtype not in DTYPES:
        known = ["auto", "fastest", *DTYPES]
        raise ConfigError(
            f"There is no dtype {dtype!r}.{near_matches(dtype, known)} Known: {listing(known)}."
        )
    return DTYPES[dtype]


def _tasks() -> str:
    return f"The tasks are {listing(get_args(Task))}."


def _refuse_missing_weights(
    model: PreTrainedModel, missing: set[str], task: str, resolved: ResolvedModel
) -> None:
    """A checkpoint without weights that the task needs would run, with random numbers in their place.

    New by nature are the head of a classifier and the pooler before it (BERT's), which many checkpoints leave out.
    """
    base = f"{model.base_model_prefix}."
    if task in HEADED:
        missing = {key for key in missing if key.startswith(base) and ".pooler." not in key}
    if not missing:
        return
    has = f" (it was saved as {listing(resolved.architectures)})" if resolved.architectures else ""
    raise ModelError(
        f"{resolved.name!r} has no weights for {len(missing)} parameters that a model for {task!r} needs{has}: "
        f"{listing(sorted(missing), most=4)}. Name another task or another base model. {_tasks()}"
    )


def _unreadable(resolved: ResolvedModel, what: str, error: Exception) -> str:
    # transformers lists every class that it knows, thousands of characters, after the first line.
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    if resolved.kind == "hub":
        same = [builtin.name for builtin in BUILTINS.values() if builtin.hub_id == resolved.name]
        hint = (
            f"The same model is built in as {same[0]!r}."
            if same
            else "Check the id and the network, or download the model and name its folder."
        )
        return f"{resolved.name!r} is no local folder, and {what} could not be loaded from the hub. {hint}\n{reason}"
    return f"{what[0].upper()}{what[1:]} could not be loaded from {resolved.location}: {reason}"
