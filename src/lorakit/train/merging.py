"""Folding adapters into their base and saving what comes out as an ordinary model, with proof that it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.attach import merge, use
from lorakit.errors import ConfigError, MergeError, listing
from lorakit.io import read
from lorakit.io.model_files import load
from lorakit.models import ResolvedModel, load_classifier, load_model, load_tokenizer, resolve
from lorakit.models.chat_template import adopt_common_template
from lorakit.models.new_folder import check_new, new_folder
from lorakit.models.streaming_merge import check_mergeable, weights_for
from lorakit.train.classifying import adapter_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 64


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk.

    Attributes:
        folder: Where it is.
        merged_difference: Largest difference of a logit, adapters merged against adapters beside the base.
        saved_difference: The same for the model read back from the folder.
        largest_logit: The largest logit of the unmerged model, to compare with.
        adapter_effect: Largest difference of a logit that the adapters make to the base.
        bytes: Size of the folder.
    """

    folder: Path
    merged_difference: float
    saved_difference: float
    largest_logit: float
    adapter_effect: float
    bytes: int


def merge_to_folder(
    model: str,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> MergeResult:
    """Merge adapters into a base model and save it with its tokenizer, as transformers saves any model.

    The folder appears whole or not at all. What was saved is read back and run beside the unmerged model. An adapter
    that `lorakit train` made for classification gives a classifier, with the names of its labels.

    Args:
        model: The base: a folder, a built-in name or a hub id.
        adapters: Folders; several are added up.
        out: Where to save; must be new or empty.
        weights: One for each adapter; 1 by default.
        dtype: To load, merge and save in.
        overwrite: Replace what is in ``out``.

    Raises:
        ConfigError: ``out`` is in use, the numbers of adapters and weights differ, or the adapters are for different
            labels.
        AdapterFileError: An adapter cannot be read, or belongs to another model.
        MergeError: An adapter has no weight form or holds a NaN, or the saved model does not compute the same.
    """
    out = Path(out)
    weights = weights_for(adapters, weights)
    check_new(out, list(map(Path, adapters)), overwrite=overwrite)
    for adapter in adapters:
        check_mergeable(str(adapter), read(adapter))
    resolved = resolve(model)
    inputs = [*map(Path, adapters), *([resolved.path] if resolved.path else [])]
    check_new(out, inputs, overwrite=overwrite)
    labels = _labels(adapters)
    loaded = _load(resolved, labels, dtype)
    tokenizer = load_tokenizer(resolved)
    adopt_common_template(adapters, tokenizer)
    mix = {f"adapter{i}": weight for i, weight in enumerate(weights)}
    for name, adapter in zip(mix, adapters, strict=True):
        load(loaded, adapter, name=name)
    probe = torch.randint(
        len(tokenizer), (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(loaded.device)
    with use(loaded, None):
        base = _logits(loaded, probe)
    with use(loaded, mix):
        beside = _logits(loaded, probe)
    merge(loaded, mix, permanent=True)
    merged_difference = _difference(_logits(loaded, probe), beside)
    with new_folder(out, inputs, overwrite=overwrite) as part:
        loaded.save_pretrained(part)
        tokenizer.save_pretrained(part)
        del loaded
        again = _load(resolve(part), labels, dtype, probe.device)
        saved_difference = _difference(_logits(again, probe), beside)
        largest = float(beside.abs().max())
        _check(saved_difference, largest, again.dtype)
        del again
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return MergeResult(out, merged_difference, saved_difference, largest, _difference(base, beside), size)


def _labels(adapters: Sequence[str | Path]) -> tuple[str, ...] | None:
    """The labels that the adapters tell apart; None when they are no classifiers.

    Raises:
        ConfigError: They are of different kinds.
    """
    first, *others = found = [adapter_labels(adapter) for adapter in adapters]
    for adapter, labels in zip(adapters[1:], others, strict=True):
        if labels != first:
            raise ConfigError(
                f"{adapters[0]} {_task(first)}, and {adapter} {_task(labels)}: these cannot be one model."
            )
    return found[0]


def _task(labels: tuple[str, ...] | None) -> str:
    return "is no classifier" if labels is None else f"tells apart {listing(labels)}"


def _load(
    resolved: ResolvedModel,
    labels: tuple[str, ...] | None,
    dtype: str,
    device: torch.device | None = None,
) -> PreTrainedModel:
    if labels is None:
        return load_model(resolved, dtype=dtype, device=device)
    return load_classifier(resolved, labels, dtype=dtype, device=device).model


def _logits(model: PreTrainedModel, probe: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=probe).logits.float()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _check(difference: float, largest: float, dtype: torch.dtype) -> None:
    """A merged weight is rounded once to the model's dtype; more than what that can do is a fault."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)
    if not difference <= tolerance * max(1.0, largest):
        raise MergeError(
            f"The saved model differs from the unmerged one by up to {difference:.2e} in a logit (largest logit "
            f"{largest:.1f}); nothing was kept. Please report this with the name of the model and the adapter's "
            "adapter_config.json."
        )
