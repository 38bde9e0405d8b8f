"""What does each trick of training bring: SmolLM2-135M, batches of 16 E2E rows, each trick left out by itself?

Every row is a process of its own, in turns with the run that has everything; the rows of data, their order and the
learning rate are the same. Where a recipe has no key for a trick it is patched away from outside. The variable
LORAKIT_DATA names the folder with ``generate/``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.harness import Benchmark, main_or_child, run_child, start
from benchmarks.qlora_memory import forget_peak, give_back, resident
from benchmarks.training.run import MODEL, ends_of_steps, fresh_model, recipe_for

STEPS, WARM = 8, 2
ALL, UPPER = "all-linear", r"model[.]layers[.]2[0-9][.].*_proj"
WITH, WITHOUT = "with", "without"


@dataclass(frozen=True)
class Trick:
    """One trick, and how to be without it.

    Attributes:
        name: What is left out, or put in.
        train: Settings of ``train`` in the recipe that differ from the run beside it.
        patches: What is patched from outside: a dotted name, and what stands in its place.
        prepare: Called with the model before training.
        added: Whether the trick is off by default, so that the run with the settings is the one that has it.
        targets: What is adapted in both runs.
        note: What a reader must know.
    """

    name: str
    train: Mapping[str, Any] = field(default_factory=dict)
    patches: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    added: bool = False
    targets: str = ALL
    note: str = ""


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _as_they_come(settings: Any, rows: Any, padded: bool) -> Any:
    from lorakit.train.batches import plan_run

    return plan_run(settings, rows, False)


def _down_to_the_embeddings(model: Any) -> None:
    """As models are left that reentrant checkpointing or a library has made to."""
    model.enable_input_require_grads()


def _freed_at_once(wanted: bool) -> AbstractContextManager[bool]:
    return nullcontext(False)


_APART = {"lorakit.train.fused_layers._readings": _nothing}
_IN_PYTHON = {"lorakit.ops.low_rank.native.product": None, "lorakit.ops.low_rank.native.layer": None}
_ALL_LOGITS = {
    "lorakit.train.loss._selects_positions": lambda forward: False,
    "lorakit.train.loss.separable_head": _nothing,
}
TRICKS = (
    Trick(
        "no padding",
        train={"batching": "padded"},
        note="Without: rows of like length stand together, padded.",
    ),
    Trick(
        "no padding, nor rows of like length",
        train={"batching": "padded"},
        patches={"lorakit.train.task.plan_run": _as_they_come},
        note="Without: rows in the order of the data, padded to the longest of their batch.",
    ),
    Trick("logits where a token is learnt", patches=_ALL_LOGITS),
    Trick("logits in parts", patches={"lorakit.train.loss.separable_head": _nothing}),
    Trick(
        "fused low-rank product",
        patches={
            **_APART,
            **_IN_PYTHON,
            "lorakit.ops.low_rank.transformed": lambda: True,
        },
        note="Without: three plain operations, as LoRA is mostly written.",
    ),
    Trick(
        "compiled low-rank product",
        patches={**_APART, **_IN_PYTHON},
        note="Without: the autograd function in Python. Where the library is not built both are the same.",
    ),
    Trick(
        "layers of one input in one function",
        patches=_APART,
        note="Where the library is not built both are the same.",
    ),
    Trick("freed memory kept", patches={"lorakit.train.trainer.kept_heap": _freed_at_once}),
    Trick(
        "compiled norms, gates and attention",
        train={"fused": False},
        note="Where the library is not built both are the same.",
    ),
    Trick("activation checkpointing", train={"activation_checkpointing": True}, added=True),
    Trick(
        "torch.compile",
        train={"compile": True},
        added=True,
        note=f"The first {WARM} steps, in which it compiles, are not counted. It runs without the compiled norms, "
        "gates and attention.",
    ),
    Trick(
        "no backward below the lowest adapter",
        prepare=_down_to_the_embeddings,
        targets=UPPER,
        note="The upper ten of thirty blocks are adapted.",
    ),
    Trick(
        "cache of the frozen part",
        train={"cache_frozen": "memory"},
        added=True,
        targets=UPPER,
        note="The upper ten of thirty blocks are adapted. Filling it, one forward pass of the lower twenty, is not "
        "counted, the memory of what it keeps is.",
    ),
)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", nargs="+", choices=[trick.name for trick in TRICKS])
    parser.add_argument("--rounds", type=int, default=3, help="turns of all rows")
    options, rest = parser.parse_known_args(argv)
    bench = start("train_ablation", __doc__ or "", rest)
    steps = WARM + 2 if bench.quick else STEPS
    chosen = [trick for trick in TRICKS if options.only is None or trick.name in options.only]
    runs: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(1 if bench.quick else bench.rounds(options.rounds)):
        for targets in dict.fromkeys(trick.targets for trick in chosen):
            runs.setdefault((targets, False), []).append(_run("", targets, steps, bench))
        for trick in chosen:
            runs.setdefault((trick.name, True), []).append(_run(trick.name, trick.targets, steps, bench))
    for trick in chosen:
        report(bench, trick, runs[trick.targets, False], runs[trick.name, True])
    bench.finish()
    return bench


def _run(trick: str, targets: str, steps: int, bench: Benchmark) -> dict[str, float]:
    plan = {"trick": trick, "targets": targets, "steps": steps, "threads": bench.threads}
    result: dict[str, float] = json.loads(run_child("train_ablation", plan).splitlines()[-1])
    return result


def report(
    bench: Benchmark,
    trick: Trick,
    plain: Sequence[Mapping[str, float]],
    changed: Sequence[Mapping[str, float]],
) -> None:
    having, lacking = (changed, plain) if trick.added else (plain, changed)
    for what, key, unit in (("seconds a step", "seconds", "s"), ("peak above the weights", "peak", "MB")):
        samples = {WITH: [run[key] for run in having], WITHOUT: [run[key] for run in lacking]}
        bench.add(f"{trick.name}: {what}", samples, unit=unit, ratio=(WITHOUT, WITH), note=trick.note)


# ---- in the child ---------------------------------------------------------------------------------------------------
def child(trick: str, targets: str, steps: int, threads: int) -> dict[str, float]:
    """One run: seconds a step, and the peak in MB above the weights."""
    import torch

    from lorakit.models import load_tokenizer
    from lorakit.train import train

    torch.set_num_threads(threads)
    chosen = next((known for known in TRICKS if known.name == trick), Trick("everything"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        recipe = recipe_for("e2e_nlg", steps, Path(folder), targets=targets, train=chosen.train)
        tokenizer = load_tokenizer(MODEL)
        model = fresh_model()
        if chosen.prepare is not None:
            chosen.prepare(model)
        give_back()
        before = resident("VmRSS")
        forget_peak()
        for where, what in chosen.patches.items():
            patches.enter_context(patch(where, what))
        result = train(recipe, model=model, tokenizer=tokenizer)
        peak = resident("VmHWM") - before
        ends = ends_of_steps(result.folder)
        return {"seconds": (ends[-1] - ends[WARM - 1]) / (steps - WARM), "peak": peak / 1e6}


if __name__ == "__main__":
    main_or_child(main, lambda plan: print(json.dumps(child(**plan))))
