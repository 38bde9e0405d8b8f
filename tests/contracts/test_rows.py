"""Rows of a mixed batch equal the runs of single adapters, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lorakit as lk
from tests.contracts.kinds import KINDS
from tests.contracts.pairs import Case, askable, close, pairs

MIX = {"a": 0.7, "b": 0.3}
ROWS = {"scattered": ("a", "b", None, "a"), "neighbours": ("b", MIX, MIX, None)}
SOME = (
    "linear", "embedding", "conv2d-groups", "mha-in", "mha-out", "experts", "linear-overridden",
    "linear-slice", "linear-slice-interleaved",
)  # fmt: skip
PLACES = [kind for kind, facts in KINDS.items() if facts.adapts != "layer"]
rows_of = pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))


def row(t: Tensor, i: int, dim: int) -> Tensor:
    return t.narrow(dim, i, 1)


def alone(case: Case, rows: tuple[object, ...], x: Tensor) -> Tensor:
    """Each row in a call of its own."""
    pieces = []
    for i, route in enumerate(rows):
        with lk.use(case.model, route):  # type: ignore[arg-type]
            pieces.append(case.model(row(x, i, case.kind.rows)))
    return torch.cat(pieces, case.kind.rows)


def mixed_case(setting: str, kind: str) -> Case:
    case = Case(kind)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    return case


@rows_of
@pairs()
def test_rows_equal_single_runs(setting: str, kind: str, rows: tuple[object, ...]) -> None:
    case, rows = mixed_case(setting, kind), tuple(askable(route, setting) for route in rows)
    with torch.no_grad():
        expected = alone(case, rows, case.x)
        with lk.use(case.model, rows=rows):  # type: ignore[arg-type]
            close(case.model(case.x), expected, 1e-12)
    with lk.use(case.model, rows=rows):  # type: ignore[arg-type]
        y = case.model(case.x)
    assert y.requires_grad
    close(y, expected, 1e-12)


@rows_of
@pairs(kinds=(*SOME, *PLACES))
def test_gradients_of_rows_equal_those_of_single_runs(
    setting: str, kind: str, rows: tuple[object, ...]
) -> None:
    case, rows = mixed_case(setting, kind), tuple(askable(route, setting) for route in rows)
    inputs = [p for name in "ab" for p in case.parameters(name).values() if p.requires_grad]
    if case.x.is_floating_point():
        inputs.append(case.x.requires_grad_())
    y = alone(case, rows, case.x)
    G = case.cotangent(y)
    expected = torch.autograd.grad((y * G).sum(), inputs)  # type: ignore[arg-type]
    with lk.use(case.model, rows=rows):  # type: ignore[arg-type]
        got = torch.autograd.grad((case.model(case.x) * G).sum(), inputs)  # type: ignore[arg-type]
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-11)


@pairs(settings=("lora", "dora", "token_rows"), kinds=("linear", "embedding", "hfconv1d"))
def test_one_packed_row_takes_a_route_for_each_token(setting: str, kind: str) -> None:
    case = mixed_case(setting, kind)
    x = case.x[:1]
    routes = ("a", None, "b")
    expected = []
    for i, route in enumerate(routes):
        with lk.use(case.model, route):
            expected.append(case.model(x)[:, i])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), lk.use(case.model, rows=routes):
            close(case.model(x), torch.stack(expected, 1), 1e-12)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "mha-in", "experts"])
def test_a_wrong_number_of_rows_is_refused(kind: str) -> None:
    case = mixed_case("lora", kind)
    with lk.use(case.model, rows=["a", "b"]), pytest.raises(lk.LorakitError, match=r"2 rows.*layer"):
        case.model(case.x)


def test_channels_are_not_rows() -> None:
    """One image of two channels and two rows asked for: not a packed row of two tokens."""
    case = mixed_case("lora", "conv2d-reflect")
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            lk.use(case.model, rows=["a", "b"]),
            pytest.raises(lk.LorakitError, match="2 rows"),
        ):
            case.model(case.x[:1])


def test_the_base_rows_keep_every_bit() -> None:
    case = mixed_case("lora", "linear")
    with torch.no_grad():
        with lk.use(case.model, None):
            base = case.model(case.x)
        with lk.use(case.model, rows=["a", None, "b", None]):
            y = case.model(case.x)
    assert torch.equal(y[1], base[1])
    assert torch.equal(y[3], base[3])
