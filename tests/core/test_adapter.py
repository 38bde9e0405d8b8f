"""Adapters as data: what does not fit together is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.core import AdapterSpec, AdapterState, Shape
from lorakit.errors import AdapterFileError

SHAPE = Shape("linear", out=5, in_=4)
SPEC = AdapterSpec(
    {"a.q": lk.LoRA(r=2), "a.v": lk.LoRA(r=1)}, {"a.q": SHAPE, "a.v": SHAPE}, base="some/model"
)


def tensors() -> dict[str, dict[str, Tensor]]:
    return {
        path: {"lora_A": torch.ones(r, 4), "lora_B": torch.ones(5, r)} for path, r in (("a.q", 2), ("a.v", 1))
    }


def test_sizes_are_counted() -> None:
    state = AdapterState(SPEC, tensors())
    assert state.numel == 3 * (4 + 5)
    assert state.nbytes == 4 * state.numel


def test_a_spec_needs_a_method_and_a_shape_for_each_target() -> None:
    with pytest.raises(AdapterFileError, match=r"missing for a\.v"):
        AdapterSpec(SPEC.methods, {"a.q": SHAPE})


def test_tensors_for_other_targets_are_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"different targets: a\.x"):
        AdapterState(SPEC, {**tensors(), "a.x": {}})
    with pytest.raises(AdapterFileError, match=r"different targets: a\.v"):
        AdapterState(SPEC, {"a.q": tensors()["a.q"]})


@pytest.mark.parametrize(
    "change",
    [
        {"lora_A": torch.ones(3, 4)},
        {"lora_B": torch.ones(2, 5)},
        {"magnitude": torch.ones(5)},
        {"lora_A": None},
    ],
    ids=["rank", "transposed", "unexpected", "missing"],
)
def test_tensors_of_other_sizes_are_refused(change: dict[str, Tensor | None]) -> None:
    wrong = tensors()
    wrong["a.q"] = {k: t for k, t in {**wrong["a.q"], **change}.items() if t is not None}
    with pytest.raises(AdapterFileError, match=r"'a\.q'.*5 x 4.*lora_A.*\(2, 4\)"):
        AdapterState(SPEC, wrong)


def test_to_makes_a_copy_of_another_dtype() -> None:
    state = AdapterState(SPEC, tensors())
    half = state.to(torch.bfloat16)
    assert half.spec is state.spec
    assert {t.dtype for g in half.tensors.values() for t in g.values()} == {torch.bfloat16}
    assert {t.dtype for g in state.tensors.values() for t in g.values()} == {torch.float32}
    assert state.to(device="meta").tensors["a.q"]["lora_A"].is_meta


def test_tensors_that_are_not_finite_are_named() -> None:
    bad = tensors()
    assert AdapterState(SPEC, bad).non_finite() == []
    bad["a.q"]["lora_B"][0, 0] = float("nan")
    bad["a.v"]["lora_A"][0, 0] = float("-inf")
    assert AdapterState(SPEC, bad).non_finite() == ["a.q:lora_B", "a.v:lora_A"]


def test_states_and_specs_do_not_change() -> None:
    state = AdapterState(SPEC, tensors())
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.spec = SPEC  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.spec.base = None  # type: ignore[misc]


def test_an_adapter_without_a_start_is_plain_already() -> None:
    state = AdapterState(SPEC, tensors())
    assert state.plain() is state


def test_the_plain_form_changes_what_has_a_start_and_nothing_else() -> None:
    draw = torch.Generator().manual_seed(0)
    methods = {
        "a.q": lk.LoRA(r=2, alpha=3, init="pissa"),
        "a.v": lk.LoRA(r=1),
        "head.weight": lk.FullFineTuning(),
    }
    shapes = {"a.q": SHAPE, "a.v": SHAPE, "head.weight": Shape("parameter", out=3, in_=5, stored=(3, 5))}
    groups = {
        path: {name: torch.randn(size, generator=draw) for name, size in method.shapes(shapes[path]).items()}
        for path, method in methods.items()
    }
    state = AdapterState(AdapterSpec(methods, shapes, base="some/model", info={"task": "sql"}), groups)
    plain = state.plain()
    assert dict(plain.spec.methods) == {**methods, "a.q": lk.LoRA(r=4, alpha=6)}
    assert (plain.spec.base, plain.spec.info) == ("some/model", {"task": "sql"})
    for path in ("a.v", "head.weight"):
        assert all(plain.tensors[path][name] is t for name, t in groups[path].items())
    p, q = groups["a.q"], plain.tensors["a.q"]
    torch.testing.assert_close(
        q["lora_B"] @ q["lora_A"], p["lora_B"] @ p["lora_A"] - p["start_B"] @ p["start_A"], rtol=0, atol=1e-5
    )
