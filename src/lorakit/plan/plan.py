"""What a run will cost, before anything is downloaded: counts, file sizes, memory of training and of inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.attach.planning import Key
from lorakit.core.method import Method
from lorakit.core.selection import Selector
from lorakit.errors import ConfigError
from lorakit.plan.architectures import Architecture, PlanTask, architecture
from lorakit.plan.counting import Counts, count
from lorakit.plan.device_kernels import Device
from lorakit.plan.memory import Weights, adapter_bytes, dtype_called, weights
from lorakit.plan.rehearsal import Rehearsal, Step, StepForm


@dataclass(frozen=True)
class Run:
    """How a model is to be trained or used.

    Attributes:
        batch: Rows in a micro-batch.
        length: Tokens in a row; padding counts.
        device: Whose kernels are assumed, ``"cuda"`` or ``"cpu"``.
        dtype: Of the base: ``"bfloat16"``, ``"float16"``, ``"float32"``; empty for bfloat16 on CUDA, float32 on a CPU.
        adapter_dtype: Of the adapter, its gradients and the optimizer's means.
        storage: ``"dense"``; ``"nf4"`` for linear layers in four bits (QLoRA), ``"int8"`` for eight.
        checkpointing: Whether activations are computed again in backward.
        packing: Whether the rows of a batch lie in one row, so that nothing is padded.
        learnt: The share of positions whose logits the loss needs: the answers in a prompt with answer.
        accumulation: Micro-batches for one optimizer step: with more than one, gradients stay while the next one runs.
        adapters: How many adapters are in memory in inference.
        selected: The share of positions that have logits, where a model can leave some out; None for ``learnt``. In
            padded rows a position that is learnt in one of them has logits in all.
        padded: Whether rows of unlike lengths are filled up to the longest, which takes a mask in every attention.
        written: Tokens that an encoder-decoder writes in a row; None for as many as it reads.

    Raises:
        ConfigError: A value makes no sense.
    """

    batch: int = 1
    length: int = 512
    device: Device = "cuda"
    dtype: str = ""
    adapter_dtype: str = "float32"
    storage: str = "dense"
    checkpointing: bool = False
    packing: bool = False
    learnt: float = 1.0
    accumulation: int = 1
    adapters: int = 1
    selected: float | None = None
    padded: bool = False
    written: int | None = None

    def __post_init__(self) -> None:
        for what, least in (("batch", 1), ("length", 1), ("accumulation", 1), ("adapters", 0)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{what} must be a whole number of at least {least}; got {value!r}.")
        if self.written is not None and self.written < 1:
            raise ConfigError(f"written must be a whole number of at least 1; got {self.written!r}.")
        if self.padded and self.packing:
            raise ConfigError("A batch is packed or padded; both were asked for.")
        for what in ("learnt", "selected"):
            share = getattr(self, what)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{what} is a share between 0 and 1; got {share!r}.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda'; got {self.device!r}.")
        dtype_called(self.base_dtype)
        dtype_called(self.adapter_dtype)

    @property
    def base_dtype(self) -> str:
        """``dtype``, or what it is by default."""
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: The base.
        adapter: The adapter.
        gradients: Of all that is trained.
        optimizer: AdamW's two running means.
        activations: What the forward and the backward pass need beyond these at the worst moment.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.above_weights

    @property
    def above_weights(self) -> int:
        """What training adds to a loaded model."""
        return self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes at the peak of reading a prompt.

    Attributes:
        weights: The base.
        adapters: All adapters in memory.
        cache: Keys and values of the batch.
        working: What the pass needs beyond these.
    """

    weights: int
    adapters: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.above_weights

    @property
    def above_weights(self) -> int:
        """What inference adds to a loaded model."""
        return self.adapters + self.cache + self.working


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        architecture: The base model.
        counts: Of the adapter.
        run: What was asked.
        training: Its memory; None for a table of layers, which cannot be rehearsed.
        inference: The same.
        weights: The base in memory.
        assumptions: What was taken for granted, one sentence each.
    """

    architecture: Architecture
    counts: Counts
    run: Run
    training: TrainingMemory | None
    inference: InferenceMemory | None
    weights: Weights
    assumptions: tuple[str, ...] = field(default=())

    def file_bytes(self, dtype: str) -> int:
        """The adapter's tensors in a file of that dtype."""
        return adapter_bytes(self.counts, dtype_called(dtype))

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        counts = self.counts
        memory = {
            name: None if part is None else {**dataclasses.asdict(part), "total": part.total}
            for name, part in (("training", self.training), ("inference", self.inference))
        }
        return {
            "model": self.architecture.name,
            "source": self.architecture.source,
            "base_parameters": counts.base,
            "adapter_parameters": counts.stored,
            "trainable": counts.trainable,
            "total_parameters": counts.total,
            "trainable_share": counts.share,
            "shared": counts.shared,
            "targets": [
                {
                    "target": ending, "size": size, "method": method, "sites": len(sites),
                    "each": sites[0].stored, "stored": sum(s.stored for s in sites),
                    "trainable": sum(s.trainable for s in sites),
                }
                for (ending, size, method), sites in counts.groups().items()
            ],
            "adapter_bytes": {name: self.file_bytes(name) for name in ("float32", "bfloat16")},
            "run": {**dataclasses.asdict(self.run), "dtype": self.run.base_dtype},
            **memory,
            "assumptions": list(self.assumptions),
        }  # fmt: skip


def plan(
    model: str | Path | Architecture,
    method: Method | Mapping[str, Method] | Mapping[Key, Method],
    targets: Selector | None = None,
    *,
    exclude: Selector | None = None,
    run: Run | None = None,
    task: PlanTask | None = None,
    num_labels: int | None = None,
    form: StepForm | None = None,
) -> Plan:
    """Plan a run from a config alone.

    Args:
        model: See `architecture`.
        method: A method or a mapping of them, as for `lorakit.attach`.
        targets: What to adapt; by default what the method says.
        exclude: What to leave out.
        run: How it is to be trained and used.
        task: What the model is for; by default the class that its config names.
        num_labels: Classes of a fresh classification head.
        form: How a training step is computed where that is not the model's own code alone.

    Raises:
        ModelError: The model cannot be found or built.
        TargetError: A target was not found or cannot be adapted.
        ConfigError: A setting makes no sense.
    """
    run = run or Run()
    base = model if isinstance(model, Architecture) else architecture(model, task=task, num_labels=num_labels)
    longest = max(run.length, run.written or 0)
    if base.longest is not None and longest > base.longest:
        raise ConfigError(f"{base.name} has positions for {base.longest:,} tokens, and length={longest:,}.")
    counts = count(base.model, method, targets, exclude)
    held = weights(base.model, dtype_called(run.base_dtype), run.storage)
    training = inference = None
    if base.runs:
        rehearsal = rehearse(base, counts, run)
        try:
            training = training_memory(counts, held, run, train_step(rehearsal, run, form))
            inference = inference_memory(counts, held, run, rehearsal.inference(run.batch, run.length))
        finally:
            rehearsal.close()
    return Plan(base, counts, run, training, inference, held, (*base.notes, *assumptions(base, run)))


def rehearse(base: Architecture, counts: Counts, run: Run) -> Rehearsal:
    """The model with the adapter on it, on the meta device."""
    return Rehearsal(
        base.model,
        counts,
        device=run.device,
        dtype=dtype_called(run.base_dtype),
        adapter_dtype=dtype_called(run.adapter_dtype),
    )


def train_step(rehearsal: Rehearsal, run: Run, form: StepForm | None = None) -> Step:
    """The step that a run repeats."""
    return rehearsal.train_step(
        run.batch,
        run.length,
        checkpointing=run.checkpointing,
        packing=run.packing,
        learnt=run.learnt,
        selected=run.selected,
        padded=run.padded,
        written=run.written,
        accumulating=run.accumulation > 1,
        form=form,
    )


def training_memory(counts: Counts, held: Weights, run: Run, step: Step) -> TrainingMemory:
    """The bill of a training step."""
    adapter_dtype = dtype_called(run.adapter_dtype)
    gradients = counts.trainable * adapter_dtype.itemsize
    peak = step.peak + held.unpacking(dtype_called(run.base_dtype))
    return TrainingMemory(
        held.total,
        adapter_bytes(counts, adapter_dtype),
        gradients,
        counts.trainable * 2 * adapter_dtype.itemsize,
        max(0, peak - gradients),
    )


def inference_memory(counts: Counts, held: Weights, run: Run, step: Step) -> InferenceMemory:
    """The bill of reading a prompt."""
    adapters = run.adapters * adapter_bytes(counts, dtype_called(run.adapter_dtype))
    working = step.peak - step.kept + held.unpacking(dtype_called(run.base_dtype))
    return InferenceMemory(held.total, adapters, step.kept, working)


def assumptions(base: Architecture, run: Run) -> tuple[str, ...]:
    """What a plan takes for granted."""
    rows = (
        f"a batch is {run.batch} x {run.length:,} tokens in one packed row, attention inside each"
        if run.packing
        else f"a batch is {run.batch} x {run.length:,} tokens, padding included"
    )
    packed = {
        "nf4": ", its linear layers but for heads in NF4 with double quantisation",
        "int8": ", its linear layers but for heads in int8",
    }.get(run.storage, "")
    listed = [
        f"the base is in {run.base_dtype}{packed}; no autocast, no copy of it in another dtype",
        f"the adapter, its gradients and AdamW's two means are in {run.adapter_dtype}",
        "1 kB is 1,000 bytes; a file has a header of some kB beside its tensors",
    ]
    if not base.runs:
        return (
            *listed,
            "a table of layers has no forward pass: activations are not known, only what is counted",
        )
    listed += [
        rows + (_other_side(run) if _two_sided(base) else ""),
        f"the loss needs the logits of {run.learnt:.0%} of the positions",
        "a step is rehearsed on the meta device with transformers' own code: attention that keeps no probabilities "
        + (
            "on CUDA"
            if run.device == "cuda"
            else "unless the model drops some of them in training (then the CPU keeps them)"
        ),
        "activations are computed again in backward, layer by layer"
        if run.checkpointing
        else "no activation checkpointing",
        "gradients are freed after each step"
        if run.accumulation == 1
        else "gradients stay between micro-batches",
        "not counted: the workspaces of kernels, the allocator's gaps, the Python process"
        + (", CUDA's context (some 0.5 GB)" if run.device == "cuda" else "")
        + ", and what a method keeps beside its parameters in training (AdaLoRA's importance scores)",
    ]
    return tuple(listed)


def _other_side(run: Run) -> str:
    many = "as many" if run.written is None else f"{run.written:,} a row"
    return f", and of an encoder-decoder {many} on the other side"


def _two_sided(base: Architecture) -> bool:
    return bool(getattr(getattr(base.model, "config", None), "is_encoder_decoder", False))
