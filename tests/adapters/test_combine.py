"""Combinations equal what the formulas say of the dense changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.adapters import combine, negated, scaled
from lorakit.core import AdapterSpec, Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, extracted, linear, loras, random_state

WEIGHTS = [0.7, -0.4, 1.5]


def wanted(path: str = "q") -> torch.Tensor:
    return sum(w * change(s, path) for w, s in zip(WEIGHTS, loras(path), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["sum", "cat"])
def test_stacking_is_the_weighted_sum(how: str) -> None:
    made = combine(loras(), WEIGHTS, how)
    assert (change(made.state) - wanted()).norm() < 1e-14 * wanted().norm()
    assert made.state.spec.methods["q"].r == 3 + 2 + 4  # type: ignore[attr-defined]
    assert (made.error, made.worst) == (0.0, None)


def test_in_float32_it_is_exact_to_rounding() -> None:
    made = combine(loras(dtype=torch.float32), WEIGHTS)
    assert made.state.tensors["q"]["lora_A"].dtype == torch.float32
    exact = sum(w * change(s) for w, s in zip(WEIGHTS, loras(dtype=torch.float32), strict=True))
    assert (change(made.state) - exact).norm() < 1e-6 * exact.norm()


def test_the_result_of_rslora_adapters_has_scale_one_and_not_the_root_of_its_rank() -> None:
    """PEFT keeps ``use_rslora`` on the result and sets ``alpha = r``: 2.4 times too large at rank 6."""
    states = [
        random_state({"q": lk.LoRA(r=3, alpha=6, scaling="rslora")}, {"q": linear()}, seed=n) for n in (1, 2)
    ]
    for kind in ({}, {"r": 6}, {"how": "svd", "r": 6}, {"how": "peft_svd", "r": 6}):
        made = combine(states, [1.0, 0.5], **kind).state  # type: ignore[arg-type]
        exact = change(states[0]) + 0.5 * change(states[1])
        assert (change(made) - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("r", [1, 2, 4, 7])
def test_the_error_of_a_cut_is_that_of_the_best_approximation(r: int) -> None:
    made = combine(loras(), WEIGHTS, r=r)
    dense = wanted()
    tail = torch.linalg.svdvals(dense)[r:].square().sum().sqrt().item()
    assert (change(made.state) - dense).norm().item() == pytest.approx(tail, rel=1e-9, abs=1e-12)
    assert made.residuals["q"].lost == pytest.approx(tail, rel=1e-9, abs=1e-12)
    assert made.error == pytest.approx(tail / dense.norm().item(), rel=1e-9, abs=1e-12)
    assert made.state.spec.methods["q"].r == r  # type: ignore[attr-defined]


def test_svd_takes_the_largest_rank_unless_told() -> None:
    assert combine(loras(), how="svd").state.spec.methods["q"].r == 4  # type: ignore[attr-defined]
    adalora = random_state({"q": lk.AdaLoRA(init_r=3, target_r=2, alpha=3)}, {"q": linear()}, seed=5)
    assert combine([adalora, loras()[1]], how="svd").state.spec.methods["q"].r == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_directions_that_hold_it(energy: float) -> None:
    made = combine(loras(), WEIGHTS, energy=energy)
    squares = torch.linalg.svdvals(wanted()).square()
    shares = squares.cumsum(0) / squares.sum()
    least = int((shares < energy - 1e-12).sum()) + 1
    assert made.state.spec.methods["q"].r == least  # type: ignore[attr-defined]


names = st.text("abq01_", min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(names, st.integers(1, 5), min_size=1, max_size=3),
            st.floats(-2, 2).map(lambda w: round(w, 6)),  # whose squares are not below what float64 holds
            st.sampled_from(["lora", "rslora"]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_any_ranks_targets_weights_and_scalings(
    adapters: list[tuple[dict[str, int], float, str]], out: int, in_: int
) -> None:
    states = [
        random_state(
            {path: lk.LoRA(r=r, alpha=3, scaling=scaling) for path, r in ranks.items()},
            dict.fromkeys(ranks, linear(out, in_)),
            seed=n,
        )
        for n, (ranks, _, scaling) in enumerate(adapters)
    ]
    weights = [w for _, w, _ in adapters]
    stacked, cut = combine(states, weights), combine(states, weights, r=2)
    assert list(stacked.state.spec.methods) == list(
        dict.fromkeys(p for ranks, _, _ in adapters for p in ranks)
    )
    for path in stacked.state.spec.methods:
        terms = [w * change(s, path) for w, s in zip(weights, states, strict=True)]
        exact = sum(terms)
        size = sum(float(t.norm()) for t in terms) + 1e-300
        assert (change(stacked.state, path) - exact).norm() <= 1e-12 * size  # type: ignore[operator]
        tail = float(torch.linalg.svdvals(exact)[2:].norm())  # type: ignore[arg-type]
        assert float((change(cut.state, path) - exact).norm()) == pytest.approx(
            tail, rel=1e-6, abs=1e-12 * size
        )


def test_scaling_and_negating_leave_the_factors_bit_for_bit() -> None:
    (state, *_) = loras(dtype=torch.bfloat16)
    half, minus = scaled(state, 0.3), negated(state)
    for made in (half, minus):
        assert torch.equal(made.tensors["q"]["lora_A"], state.tensors["q"]["lora_A"])
    assert torch.equal(half.tensors["q"]["lora_B"], state.tensors["q"]["lora_B"])
    assert torch.equal(minus.tensors["q"]["lora_B"], -state.tensors["q"]["lora_B"])
    torch.testing.assert_close(change(half), 0.3 * change(state))
    torch.testing.assert_close(change(minus), -change(state))


def test_a_bias_is_added_up_too() -> None:
    a = random_state({"q": lk.LoRA(r=2, alpha=5, bias=True)}, {"q": linear()}, seed=1)
    b = random_state({"q": lk.LoRA(r=2, alpha=1)}, {"q": linear()}, seed=2)
    for cut in ({}, {"r": 2}):
        made = combine([a, b], [0.5, 2.0], **cut).state  # type: ignore[arg-type]
        lora = made.spec.methods["q"]
        assert isinstance(lora, lk.LoRA)
        torch.testing.assert_close(
            lora.scale * made.tensors["q"]["lora_bias"], 1.25 * a.tensors["q"]["lora_bias"]
        )


def test_all_low_rank_methods_mix() -> None:
    shape = {"q": linear(6, 5)}
    made = [
        random_state({"q": lk.LoRA(r=2, alpha=3)}, shape, seed=1),
        random_state({"q": lk.VeRA(r=3, max_in=8, max_out=8)}, shape, seed=2),
        random_state({"q": lk.LoRA(r=2, alpha=3, init="pissa")}, shape, seed=3),
        random_state({"q": lk.DyLoRA(r=2, alpha=3)}, shape, seed=4),
        random_state({"q": lk.AdaLoRA(init_r=2, target_r=1, alpha=3)}, shape, seed=5),
        random_state({"q": lk.LoRAFA(r=2, alpha=3)}, shape, seed=6),
    ]
    exact = sum(change(s) for s in made)
    assert (change(combine(made).state) - exact).norm() < 1e-12 * exact.norm()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("method", [lk.LoHa(r=2, alpha=3), lk.LoKr(r=2, alpha=3, factor=2)])
def test_methods_without_factors_go_by_their_dense_change(method: lk.LoHa) -> None:
    shape = {"q": linear(6, 8)}
    a = random_state({"q": method}, shape, seed=1)
    b = random_state({"q": lk.LoRA(r=2, alpha=3)}, shape, seed=2)
    with pytest.raises(ConfigError, match=r"'q' is adapted by lo.* dense=True"):
        combine([a, b])
    with pytest.raises(ConfigError, match=r"'q' is dense: say how many directions"):
        combine([a, b], dense=True)
    made = combine([a, b], [0.5, 2], dense=True, r=6)
    exact = 0.5 * change(a) + 2 * change(b)
    assert (change(made.state) - exact).norm() < 1e-12 * exact.norm()


def test_dora_is_refused_without_its_base_and_exact_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6)).double()
    a, b = (extracted(model, m, seed=n) for n, m in enumerate([lk.DoRA(lk.LoRA(r=2)), lk.LoRA(r=2)]))
    with pytest.raises(ConfigError, match="DoRA: what it adds depends on the base weight"):
        combine([a, b])
    W = model[0].weight.detach()
    made = combine([a, b], [0.5, 1.0], r=5, base={"0": W})
    lk.attach(model, a, name="a")
    lk.merge(model)
    exact = 0.5 * (model[0].weight.detach() - W) + change(b, "0")
    assert (change(made.state, "0") - exact).norm() < 1e-10 * exact.norm()


def test_stacks_of_matrices() -> None:
    shape = {"c": Shape("conv", out=3, in_=8, batch=(2,), kernel=(2, 2))}
    states = [random_state({"c": lk.LoRA(r=r, alpha=3)}, shape, seed=r) for r in (1, 2)]
    exact = change(states[0], "c") - change(states[1], "c")
    torch.testing.assert_close(change(combine(states, [1, -1]).state, "c"), exact)
    cut = combine(states, [1, -1], r=1)
    tail = torch.linalg.svdvals(exact)[..., 1:].norm().item()
    assert (change(cut.state, "c") - exact).norm().item() == pytest.approx(tail)
    assert cut.residuals["c"].lost == pytest.approx(tail)


def test_trained_copies_are_never_added_up_in_silence() -> None:
    shapes = {"q": linear(), "head.weight": Shape("parameter", out=2, in_=3, stored=(2, 3))}
    methods = {"q": lk.LoRA(r=1), "head.weight": lk.FullFineTuning()}
    a, b = (random_state(methods, shapes, seed=n) for n in (1, 2))
    with pytest.raises(ConfigError, match=r"'head.weight'.*copies='average'"):
        combine([a, b])
    mean = combine([a, b], [3, 1], copies="average").state
    expected = 0.75 * a.tensors["head.weight"]["value"] + 0.25 * b.tensors["head.weight"]["value"]
    torch.testing.assert_close(mean.tensors["head.weight"]["value"], expected)
    assert list(combine([a, b], copies="drop").state.spec.methods) == ["q"]
    with pytest.raises(ConfigError, match="add up to zero"):
        combine([a, b], [1, -1], copies="average")


def test_adapters_that_do_not_belong_together_are_refused() -> None:
    a, b, _ = loras()
    with pytest.raises(
        ConfigError, match=r"'q' is a linear of 9 x 7 in one adapter and a linear of 9 x 8 in adapter 2"
    ):
        combine([a, random_state({"q": lk.LoRA(r=1)}, {"q": linear(9, 8)})])
    named = [
        random_state({"q": lk.LoRA(r=1)}, {"q": linear()}, base=base)
        for base in ("org/one", "two", "./x/ONE/")
    ]
    with pytest.raises(ConfigError, match="different base models: 'org/one' and 'two'"):
        combine(named[:2])
    assert combine(named[:2], any_base=True).state.spec.base == "org/one"
    assert combine([named[0], named[2]]).state.spec.base == "org/one"
    b.tensors["q"]["lora_B"][0, 0] = float("nan")
    with pytest.raises(ConfigError, match="Adapter 2 of 2 holds a NaN or an infinity in q:lora_B"):
        combine([a, b])


def test_a_result_that_does_not_fit_its_dtype_is_refused() -> None:
    a = random_state({"q": lk.LoRA(r=1)}, {"q": linear()}, dtype=torch.float16)
    b = random_state({"q": lk.LoRA(r=1)}, {"q": linear()}, dtype=torch.float16)
    a.tensors["q"]["lora_B"].fill_(60_000)
    b.tensors["q"]["lora_B"].fill_(60_000)
    a.tensors["q"]["lora_A"].fill_(60_000)
    b.tensors["q"]["lora_A"].fill_(60_000)
    with pytest.raises(ConfigError, match="does not fit the dtype of q:lora_"):
        combine([a, b], [1.0, 1.0], r=1)
    assert combine([a, b], r=1, dtype=torch.float32).error < 1e-7


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"how": "som"}, "Did you mean 'sum'"),
        ({"weights": [1.0]}, "a finite weight for each of 3 adapters"),
        ({"weights": [1.0, float("nan"), 2.0]}, "a finite weight"),
        ({"how": "ties"}, "ties needs density"),
        ({"density": 0.5}, "sum takes no density"),
        ({"how": "ties", "density": 0.0}, "in \\(0, 1\\]"),
        ({"how": "cat", "r": 2}, "follow from the inputs"),
        ({"how": "peft_svd", "energy": 0.5}, "knows no energy"),
        ({"r": 0}, "at least 1"),
        ({"energy": 1.5}, "share of the squared norm"),
        ({"copies": "no"}, "copies is"),
        ({"how": "peft_linear"}, "all ranks must be equal"),
    ],
)
def test_settings_that_make_no_sense(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combine(loras(), **settings_)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one adapter"):
        combine([])


def test_a_combination_acts_as_its_parts_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    a = extracted(model, lk.LoRA(r=2, scaling="rslora"), seed=1)
    b = extracted(model, lk.LoRA(r=3), seed=2, targets=["2"])
    x = torch.randn(3, 5, dtype=torch.float64)
    lk.attach(model, a, name="a")
    lk.attach(model, b, name="b")
    lk.attach(model, combine([a, b], [0.5, 2.0]).state, name="both")
    with lk.use(model, {"a": 0.5, "b": 2.0}):
        mixed = model(x)
    with lk.use(model, "both"):
        torch.testing.assert_close(model(x), mixed, rtol=1e-12, atol=1e-12)


def test_what_the_files_agree_on_is_kept() -> None:
    a, b, _ = loras()
    info = [
        {"task": "sql", "peft": {"task_type": "CAUSAL_LM", "transposed": ["q"]}},
        {"task": "sql", "tool": 1},
    ]
    states = [
        lk.AdapterState(AdapterSpec(s.spec.methods, s.spec.shapes, None, i), s.tensors)
        for s, i in zip((a, b), info, strict=True)
    ]
    made = combine(states, [1, 2]).state.spec.info
    assert made == {
        "task": "sql",
        "peft": {"transposed": ["q"]},
        "combined": {"how": "sum", "weights": [1.0, 2.0]},
    }
