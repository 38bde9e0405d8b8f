"""Merging adapters into a checkpoint on the disk, one tensor at a time: the model itself is never loaded.

The model is built on the meta device, which has names, layers and ties and no numbers: it says where each adapter acts,
as `lorakit.attach` would. Then the checkpoint is read tensor by tensor, what is changed is folded in with the code of
`lorakit.merge`, and everything is written on under the name and in the file that it had. The memory needed is that of
the largest tensor and a few megabytes, beside the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.attach.fold import Change, blocks, wide_dtype
from lorakit.core.adapter import AdapterState
from lorakit.errors import ConfigError, MergeError, near_matches
from lorakit.io import read
from lorakit.io.checkpoint_writer import shards, write_checkpoint
from lorakit.io.model_outline import outline_of
from lorakit.io.publish import DISK
from lorakit.io.safetensors_file import pieces_of
from lorakit.methods import FullFineTuning
from lorakit.models.chat_template import carry_template
from lorakit.models.headed_source import HeadedSource, name_labels
from lorakit.models.load import DTYPES, HEADED
from lorakit.models.merge_plan import Job, MergePlan
from lorakit.models.merge_source import MergeSource, merge_source
from lorakit.models.new_folder import new_folder
from lorakit.models.purpose import Purpose, common_purpose
from lorakit.ops import all_finite
from lorakit.plan.architectures import PlanTask, architecture

_SHARD_BYTES = 5_000_000_000
_LARGEST = 3.4e38  # of float32, about


@dataclass(frozen=True)
class Rounding:
    """What was merged into one tensor, and what writing it in its dtype took, beside the same merge in float64.

    Attributes:
        change: Frobenius norm of what the adapters add, in float64.
        error: Norm of the difference between what was written and the merge in float64.
        largest: The largest difference of one entry.
    """

    change: float
    error: float
    largest: float


@dataclass(frozen=True)
class MergedCheckpoint:
    """A merged checkpoint on disk.

    Attributes:
        folder: Where it is.
        bytes: Of all tensors.
        changed: Tensor name to what was merged into it and what the rounding took; None where it was not measured.
        copied: How many tensors are as they were.
        untied: Whether the embedding and the head, one tensor in the base, are two now.
    """

    folder: Path
    bytes: int
    changed: Mapping[str, Rounding | None]
    copied: int
    untied: bool

    @property
    def error(self) -> float | None:
        """The share of the norm of the whole change that rounding took; None where it was not measured."""
        measured = [found for found in self.changed.values() if found is not None]
        change = sum(found.change**2 for found in measured) ** 0.5
        if len(measured) < len(self.changed):
            return None
        return sum(found.error**2 for found in measured) ** 0.5 / change if change else 0.0

    @property
    def worst(self) -> tuple[str, float] | None:
        """The tensor of which rounding took the largest share of the change, and that share."""
        shares = {name: f.error / f.change for name, f in self.changed.items() if f is not None and f.change}
        return max(shares.items(), key=lambda item: item[1]) if shares else None


def merge_checkpoint(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    task: PlanTask | None = None,
    measure: bool = True,
    overwrite: bool = False,
) -> MergedCheckpoint:
    """Merge adapters into a checkpoint without loading its model; the same bits as merging in memory gives.

    Everything else of the base's folder that belongs to the model (config, tokenizer, licence) is carried along. An
    adapter that was trained with a head gives a model with that head, whose config names the labels. The folder
    appears whole or not at all.

    Args:
        base: A folder with safetensors, a built-in name, or a GGUF file of the Llama family.
        adapters: Folders; several are added up, each measured from the base.
        out: Where to write; must be new or empty.
        weights: One for each adapter; 1 by default.
        dtype: Of the result: ``"auto"`` keeps that of each tensor.
        task: What the model is for, where the adapters were made on another class than the config names, and do not
            say so themselves.
        measure: Compute each merge in float64 too, to tell what rounding took: about half of the time.
        overwrite: Replace what is in ``out``.

    Raises:
        ConfigError: ``out`` is in use, the numbers of adapters and weights differ, a word is unknown, or the adapters
            are for different heads.
        ModelError: The base is no model that transformers knows.
        AdapterFileError: An adapter or the checkpoint cannot be read, or they do not belong together.
        MergeError: An adapter has no weight form or holds a NaN, or something cannot be merged without loading the
            model; the message says what.
    """
    out, paths = Path(out), [Path(adapter) for adapter in adapters]
    weights = weights_for(paths, weights)
    if dtype != "auto" and dtype not in DTYPES:
        known = ["auto", *DTYPES]
        raise ConfigError(
            f"No dtype is called {dtype!r}.{near_matches(dtype, known)} Known: {', '.join(known)}."
        )
    purpose = common_purpose(paths)
    source = merge_source(base)
    with new_folder(out, [source.path, *paths], overwrite=overwrite) as part, torch.no_grad():
        source.write_settings(part)
        carry_template(paths, part)
        if purpose.labels is not None:
            name_labels(part, purpose.labels, texts=purpose.kind == "sequence-classification")
        model: Any = architecture(part, task=task or _class_of(purpose)).model
        if purpose.headed:
            source = HeadedSource(source, model)
        plan = MergePlan(source, model)
        for path, weight in zip(paths, weights, strict=True):
            plan.add(str(path), _read(path, plan), weight)
        jobs, untied = plan.jobs()
        if isinstance(source, HeadedSource):
            source.check_brought(_replaced(jobs), weights)
        merging = _Merging(source, jobs, DTYPES.get(dtype), measure)
        size = write_checkpoint(part, merging.files(), merging.pieces)
        source.write_config(part, dtype=None if dtype == "auto" else dtype, untied=untied)
        DISK.sync(part)
    DISK.sync(out.parent)
    changed = merging.roundings
    return MergedCheckpoint(out, size, changed, len(merging.sizes) - len(changed), untied)


def weights_for(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> list[float]:
    """One weight for each adapter, 1 by default.

    Raises:
        ConfigError: There are no adapters, another number of weights, or a weight that is no finite number.
    """
    if not adapters:
        raise ConfigError("Name at least one adapter to merge.")
    if weights is None:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(weights)} weights for {len(adapters)} adapters: give one for each.")
    if not all(abs(weight) <= _LARGEST for weight in weights):
        raise ConfigError(
            f"A weight of an adapter must be a finite number (of float32); got {list(weights)}."
        )
    return list(weights)


def check_mergeable(path: str, state: AdapterState) -> None:
    """Raise `ConfigError` for an adapter that LoftQ started: it makes up for the errors of one quantised base."""
    if "loftq" in state.spec.info:
        raise ConfigError(
            f"{path} was started by LoftQ: it belongs to the quantised base that it was trained on, not to the "
            "dense one that would be merged into. Score and use it by its recipe."
        )


def _read(path: Path, plan: MergePlan) -> AdapterState:
    state = read(path, outline=outline_of(plan.model))
    check_mergeable(str(path), state)
    return state


def _class_of(purpose: Purpose) -> PlanTask | None:
    """The kind of model that the adapters were made on, where the config of a body would name another one."""
    return purpose.kind if purpose.kind in (*HEADED, "feature-extraction") else None


def _replaced(jobs: Mapping[str, Job]) -> list[str]:
    """The tensors that are trained copies and not changes of what was there."""
    whole = FullFineTuning
    return [name for name, job in jobs.items() if any(isinstance(c.method, whole) for c in job.changes)]


class _Merging:
    """What is written: the sizes beforehand, the bytes when they are asked for."""

    def __init__(
        self, source: MergeSource, jobs: Mapping[str, Job], dtype: torch.dtype | None, measure: bool
    ) -> None:
        self._source, self._jobs, self._wanted = source, jobs, dtype
        self._measure = measure
        self.roundings: dict[str, Rounding | None] = {}
        origin = {**{name: name for name in source}, **{name: job.origin for name, job in jobs.items()}}
        self._origin = origin
        self.sizes = {name: (self._dtype(old), source.shape(old)) for name, old in origin.items()}

    def files(self) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """File to what it holds: as in the base; of a base that is one file of another kind, in shards."""
        found: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for name, size in self.sizes.items():
            file = self._source.file(self._origin[name])
            if file is None:
                found = shards(self.sizes, _SHARD_BYTES)
                break
            found.setdefault(file, {})[name] = size
        return found

    def pieces(self, name: str) -> Iterable[Any]:
        """The bytes of a tensor, merged where something changes it."""
        job, origin, dtype = self._jobs.get(name), self._origin[name], self.sizes[name][0]
        if job is not None and (job.changes or job.added is not None):
            return pieces_of(self._merged(name, job))
        if dtype is self._source.dtype(origin):
            return self._source.pieces(origin)
        return pieces_of(self._source[origin].to(dtype))

    def _dtype(self, origin: str) -> torch.dtype:
        own = self._source.dtype(origin)
        return own if self._wanted is None or not own.is_floating_point else self._wanted

    def _merged(self, name: str, job: Job) -> Tensor:
        stored, dtype = self._source[job.origin], self.sizes[name][0]
        out = stored if dtype is stored.dtype else stored.to(dtype)
        exactly = out.dtype is not torch.float64
        change = error = largest = 0.0
        changes = [_arranged(one) for one in job.changes]
        wide = wide_dtype(stored.dtype)
        dtypes = (wide, torch.float64) if self._measure and exactly else (wide,)
        for block in blocks(stored, changes, job.added, dtypes=dtypes):
            new = block.merged(stored, wide)
            if not self._measure:
                block.view(out).copy_(new)
                continue
            exact = block.merged(stored, torch.float64) if exactly else new
            change += _squares(exact - block.view(stored))
            block.view(out).copy_(new)
            lost = exact - block.view(out)
            error += _squares(lost)
            largest = max(largest, *(abs(float(end)) for end in torch.aminmax(lost)))
        if not all_finite(out):
            raise MergeError(
                f"Merging would give a NaN or an infinity in {name!r} as {dtype}; nothing was written. A wider dtype "
                "may hold it (--dtype float32)."
            )
        self.roundings[name] = Rounding(change**0.5, error**0.5, largest) if self._measure else None
        return out


def _squares(values: Tensor) -> float:
    """The sum of the squares."""
    flat = values.flatten()
    return float(torch.dot(flat, flat))


def _arranged(change: Change) -> Change:
    """With the parameters laid out as attaching lays them out: sums then run in the same order."""
    roles, target = change.method.roles, change.target
    laid = {name: target.arrange(roles.get(name, ""), t.detach()) for name, t in change.parameters.items()}
    return change._replace(parameters=laid)
