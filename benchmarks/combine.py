"""How long do combining adapters, resizing one, and extracting one from a tuned layer take?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import nn

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Aim, Benchmark, Side, start
from benchmarks.subjects import check_equal, folder, linear_holder, with_peft
from lorakit.adapters import combine, from_checkpoints, resize
from lorakit.core import LowRankMethod

RANK = 8
WEIGHTS = [0.7, 0.3]


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("combine", __doc__ or "", argv)
    for width in (256,) if bench.quick else (768, 4096):
        compare(bench, width)
    bench.finish()
    return bench


def compare(bench: Benchmark, width: int) -> None:
    """Both libraries on one layer of this width; PEFT's full decomposition sets the number of rounds."""
    wide = width > 1000  # there PEFT's full decomposition takes a minute, for resizing as for combining
    rounds = 2 if wide else 15
    model, states = subjects(width)
    names = count()

    def theirs(adapters: list[str], weights: list[float], kind: str, rank: int | None) -> None:
        name = f"made{next(names)}"
        model.add_weighted_adapter(adapters, weights, name, combination_type=kind, svd_rank=rank)
        made.append(name)

    made: list[str] = []

    def forget() -> None:
        while len(made) > 1:
            model.delete_adapter(made.pop(0))

    # One adapter alone PEFT does not cut: it combines it "linearly". The second one has weight zero.
    for what, ours, args, aim in (
        (
            "two adapters added exactly (cat)",
            lambda: combine(states, WEIGHTS, "cat"),
            (["a", "b"], WEIGHTS, "cat", None),
            None,
        ),
        (
            f"two adapters added and cut to r={RANK} (svd)",
            lambda: combine(states, WEIGHTS, r=RANK),
            (["a", "b"], WEIGHTS, "svd", RANK),
            Aim("ratio", ">=", 100 if width < 1000 else 1000),
        ),
        (
            f"r={RANK} resized to r={RANK // 2}",
            lambda: resize(states[0], RANK // 2),
            (["a", "b"], [1.0, 0.0], "svd", RANK // 2),
            Aim("ratio", ">=", 100 if width < 1000 else 1000),
        ),
    ):
        if wide and "resized" in what:
            continue
        theirs(*args)
        layer = model.base_model.model.q
        check_equal(delta(ours().state), layer.get_delta_weight(made[-1]), what)
        sides = {LORAKIT: Side(ours), PEFT: Side(lambda args=args: theirs(*args), after=forget)}
        few, warm = (rounds, 0 if wide else 1) if args[2] == "svd" else (15, 1)
        bench.add(f"{what}, {width} x {width}", bench.measure(sides, rounds=few, warmup=warm), aim=aim)
    tuned(bench, width, rounds)


def tuned(bench: Benchmark, width: int, rounds: int) -> None:
    """PEFT has no extraction: the exact way, a full decomposition, is what it is measured against."""
    torch.manual_seed(0)
    base = {"q.weight": torch.randn(width, width)}
    new = {"q.weight": base["q.weight"] + torch.randn(width, 32) @ torch.randn(32, width) / width}
    sides = {
        LORAKIT: Side(lambda: from_checkpoints(base, new, r=32, exact=False)),
        "exact": Side(lambda: from_checkpoints(base, new, r=32)),
    }
    fast = from_checkpoints(base, new, r=32, exact=False).fitted
    if fast.error > 1e-4:
        raise SystemExit(f"extract: the fast way lost {fast.error:.1e}; nothing was measured.")
    if width > 1000:
        del sides["exact"]  # it takes minutes
    bench.add(
        f"a rank-32 adapter extracted from a tuned layer, {width} x {width}",
        bench.measure(sides, rounds=rounds, warmup=1),
        ratio=("exact", LORAKIT) if "exact" in sides else None,
        note="PEFT cannot extract. The exact way decomposes the whole difference in float64.",
    )


def subjects(width: int) -> tuple[nn.Module, list[lk.AdapterState]]:
    """PEFT's model with two adapters, and the same adapters as data."""
    from peft import LoraConfig

    model = with_peft(linear_holder(width), ["q"], r=RANK, lora_alpha=16)
    for name in ("a", "b"):
        model.add_adapter(
            name, LoraConfig(r=RANK, lora_alpha=16, target_modules=["q"], init_lora_weights=False)
        )
    with folder() as directory:
        model.save_pretrained(directory, selected_adapters=["a", "b"])
        states = [lk.read(directory, name=name) for name in ("a", "b")]
    return model, states


def delta(state: lk.AdapterState) -> torch.Tensor:
    """The change of the only layer."""
    method = state.spec.methods["q"]
    assert isinstance(method, LowRankMethod)
    A, B, scale = method.factors(state.spec.shapes["q"], state.tensors["q"])
    return scale * (B @ A)


if __name__ == "__main__":
    main()
