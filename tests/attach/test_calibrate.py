"""Starts from data: what is measured, what comes of it, and that the model is as before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.attach import calibrate
from lorakit.errors import ConfigError, MergeError, UnsupportedTargetError
from lorakit.methods.init.eva import Components
from tests.attach.architectures import bert, gpt2, llama
from tests.attach.small_models import Mlp, picture, same_values, values
from tests.contracts.kinds import KINDS
from tests.methods.init.test_eva import largest_angle

EVA = lk.LoRA(r=2, alpha=4, init="eva")
GA = lk.LoRA(r=2, alpha=4, scaling="rslora", init="lora_ga")


def text(batches: int = 4, rows: int = 6, length: int = 12, padded: int = 0) -> list[dict[str, Tensor]]:
    """Batches of token ids with labels; the last ``padded`` tokens of every other row are padding."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        ids = torch.randint(3, 50, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        if padded:
            mask[::2, -padded:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return made


def inputs_of(model: nn.Module, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """All vectors that a layer receives for tokens that are no padding."""
    seen: list[Tensor] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [b["attention_mask"].bool() for b in batches]
    return torch.cat([x[m] if x.dim() == 3 else x for x, m in zip(seen, masks, strict=True)])


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], None]]:
    """Check afterwards that models are as they were when they were named."""
    known: list[tuple[nn.Module, Any, Any, list[tuple[bool, Tensor | None]]]] = []

    def flags(model: nn.Module) -> list[tuple[bool, Tensor | None]]:
        return [(p.requires_grad, p.grad) for p in model.parameters()]

    yield lambda model: known.append((model, picture(model), values(model), flags(model)))
    for model, before, numbers, grads in known:
        assert picture(model) == before
        same_values(model, numbers)
        assert flags(model) == grads


# ---- EVA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_eva_starts_in_the_principal_directions_of_the_inputs(
    build: Callable[[], nn.Module], untouched: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    model, batches = build(), text(padded=4)
    if build is bert:
        batches = [{**b, "labels": torch.tensor([0, 1, 2, 0, 1, 2])} for b in batches]
    model.train()
    model.get_submodule(next(iter(dict(model.named_children())))).eval()  # modes that are not all alike
    next(model.parameters()).requires_grad_(False)
    untouched(model)
    method = lk.LoRA(r=4, init="eva")  # of which so much is kept in 24 dimensions that nothing is cut off
    state = lk.eva(model, method, batches, tau=1.0, seed=0)
    plan = lk.find(model)
    ranks = {path: method.r for path, method in state.spec.methods.items()}  # type: ignore[attr-defined]
    assert sum(ranks.values()) == 4 * len(plan)
    assert max(ranks.values()) <= 8
    twin = copy.deepcopy(model).eval()
    for path, r in ranks.items():
        rows = inputs_of(twin, path, batches).double()
        exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:r]
        A, B = state.tensors[path]["lora_A"], state.tensors[path]["lora_B"]
        assert largest_angle(A, exact) < 1e-3, path
        torch.testing.assert_close(A @ A.mT, torch.eye(r), rtol=0, atol=1e-5)
        assert not B.any()
        assert B.shape == (state.spec.shapes[path].out, r)
    before = twin(**batches[0]).logits
    report = lk.attach(twin, state, trainable=True)
    assert torch.equal(twin(**batches[0]).logits, before)
    assert report.trainable == state.numel


@pytest.mark.parametrize("keep", ["scale", "alpha"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_what_stays_where_the_rank_changes(keep: Any, scaling: str) -> None:
    method = lk.LoRA(r=2, alpha=6, scaling=scaling, init="eva")
    state = lk.eva(llama(), method, text(), keep=keep, seed=0)
    found = [m for m in state.spec.methods.values() if isinstance(m, lk.LoRA)]
    assert len({m.r for m in found}) > 1
    for m in found:
        if keep == "scale":
            assert m.scale == pytest.approx(method.scale, rel=1e-12)
            assert (scaling == "rslora") or m.alpha == pytest.approx(6 * m.r / 2)
        else:
            assert m.alpha == 6


def test_without_room_every_layer_keeps_its_rank() -> None:
    method = lk.LoRA(r=2, init="eva", rank_pattern={"down_proj": 5})
    state = lk.eva(llama(), method, text(), rho=1.0, seed=0)
    assert {p: m.r for p, m in state.spec.methods.items()} == {  # type: ignore[attr-defined]
        t.path: 5 if t.path.endswith("down_proj") else 2 for t in lk.find(llama())
    }


def test_a_layer_without_variance_is_left_out() -> None:
    torch.manual_seed(0)
    model = Mlp()
    with torch.no_grad():  # fc2 reads a wide spectrum, fc1 a single direction
        x = torch.randn(50, 1) @ torch.randn(1, 6) + 1e-4 * torch.randn(50, 6)
    state = lk.eva(model, lk.LoRA(r=2, init="eva"), [x], rho=2.0, seed=0)
    assert {p: m.r for p, m in state.spec.methods.items()} == {"fc1": 1, "fc2": 3}  # type: ignore[attr-defined]
    blocks = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            flat = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            return self.blocks["a"](x) + self.blocks["b"](flat)

    rows = torch.randn(200, 6) * torch.tensor(
        [1.0, 0.9, 0, 0, 0, 0]
    )  # half the variance each; b: a sixth each
    state = lk.eva(Two(), lk.LoRA(r=1, init="eva"), [rows], seed=0)
    assert {p: m.r for p, m in state.spec.methods.items()} == {"blocks.a": 2}  # type: ignore[attr-defined]


def test_padding_and_ignored_labels_do_not_count() -> None:
    model = llama()
    batches = text(padded=5)
    other = [
        {**b, "input_ids": b["input_ids"].where(b["attention_mask"].bool(), 7), "labels": b["labels"]}
        for b in batches
    ]
    one, two = (lk.eva(model, EVA, data, seed=0, tau=1.0) for data in (batches, other))
    assert one.spec == two.spec
    for path, name, tensor in one.all_tensors():
        torch.testing.assert_close(tensor, two.tensors[path][name], rtol=0, atol=1e-5)
    learnt = [{**b, "labels": b["labels"].clone()} for b in batches]
    for b in learnt:
        b["labels"][:, :6] = -100
    path = "model.layers.0.self_attn.q_proj"
    exactly = lk.LoRA(r=4, init="eva")
    fewer, all_tokens = (
        lk.eva(model, exactly, learnt, seed=0, tau=1.0, rho=1, ignored_label=i) for i in (-100, None)
    )
    rows = inputs_of(model, path, learnt)
    kept = torch.cat([(b["labels"] != -100)[b["attention_mask"].bool()] for b in learnt])
    for state, chosen in ((fewer, rows[kept]), (all_tokens, rows)):
        exact = torch.linalg.svd((chosen - chosen.mean(0)).double(), full_matrices=False).Vh[:4]
        assert largest_angle(state.tensors[path]["lora_A"], exact) < 1e-3


def test_layers_that_receive_the_same_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Components.updated

    def counting(self: Components, *args: Any) -> Components:
        calls.append(1)
        return real(self, *args)

    monkeypatch.setattr(Components, "updated", counting)
    state = lk.eva(llama(), EVA, text(batches=3), tau=1.0, rho=1, seed=0)
    assert len(calls) == 3 * 2 * 4, "of seven layers in a block q, k, v share, and gate, up"
    q, k = (state.tensors[f"model.layers.1.self_attn.{x}_proj"]["lora_A"] for x in "qk")
    assert torch.equal(q, k)
    calls.clear()
    mixed = lk.LoRA(r=2, init="eva", rank_pattern={"k_proj": 3})
    lk.eva(llama(), mixed, text(batches=1), rho=1, seed=0)
    assert len(calls) == 2 * 5, "k wants another number of components"


def test_it_stops_when_the_directions_have_settled() -> None:
    batches = text(batches=1) * 8
    state = lk.eva(llama(), EVA, batches, tau=0.99, seed=0)
    assert state.spec.info["eva"] == {
        "batches": 2,
        "settled": True,
        "rho": 2.0,
        "tau": 0.99,
        "analysis": "pca",
    }
    state = lk.eva(llama(), EVA, text(batches=2), tau=1.0, seed=0)
    assert (state.spec.info["eva"]["batches"], state.spec.info["eva"]["settled"]) == (2, False)


def test_without_centring() -> None:
    model, batches = llama(), text()
    state = lk.eva(model, lk.LoRA(r=4, init="eva"), batches, analysis="svd", rho=2, tau=1.0, seed=0)
    path = "model.layers.1.self_attn.q_proj"
    r = len(state.tensors[path]["lora_A"])
    exact = torch.linalg.svd(inputs_of(model, path, batches).double(), full_matrices=False).Vh[:r]
    assert largest_angle(state.tensors[path]["lora_A"], exact) < 1e-3


@pytest.mark.parametrize(
    "method",
    [lk.DoRA(EVA), lk.LoRAFA(r=2, init="eva"), lk.LoRA(r=2, init="eva", bias=True)],
    ids=["dora", "fa", "bias"],
)
def test_what_wraps_or_extends_a_lora_starts_from_data_too(method: lk.LoRA) -> None:
    model, batches = llama(), text()
    before = model(**batches[0]).logits
    state = lk.eva(model, method, batches, ["q_proj", "down_proj"], seed=0)
    assert {type(m) for m in state.spec.methods.values()} == {type(method)}
    lk.attach(model, state, trainable=True)
    torch.testing.assert_close(model(**batches[0]).logits, before, rtol=0, atol=1e-6)
    model(**batches[0]).loss.backward()
    assert all(p.grad is not None for p in lk.trainable(model).values())


def test_other_methods_beside_it_start_as_they_always_do() -> None:
    model, batches = bert(), text()
    batches = [{**b, "labels": torch.tensor([0, 1, 2, 0, 1, 2])} for b in batches]
    state = lk.eva(
        model, {"all-linear": EVA, "query": lk.LoRA(r=3), "classifier": lk.FullFineTuning()}, batches, seed=0
    )
    assert torch.equal(state.tensors["classifier.weight"]["value"], model.classifier.weight)
    queries = [m for p, m in state.spec.methods.items() if p.endswith("query")]
    assert queries == [lk.LoRA(r=3)] * 2
    lk.attach(model, state, trainable=True)


def test_slices_of_one_layer() -> None:
    model = gpt2()
    state = lk.eva(model, EVA, text(), ["c_attn[q]", "c_attn[v]"], rho=1, seed=0)
    q, v = (state.tensors[f"transformer.h.0.attn.c_attn[{part}]"] for part in "qv")
    assert torch.equal(q["lora_A"], v["lora_A"])
    assert q["lora_B"].shape == (16, 2)
    lk.attach(model, state)


@pytest.mark.parametrize("form", ["tensor", "tuple", "function"])
def test_batches_of_other_forms(form: str) -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(40, 6)
    batches: list[Any] = {"tensor": [x], "tuple": [(x,)], "function": ["x"]}[form]
    run = (lambda model, _: model(x)) if form == "function" else None
    state = lk.eva(model, EVA, batches, rho=1, run=run, seed=0)
    exact = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False).Vh[:2]
    assert largest_angle(state.tensors["fc1"]["lora_A"], exact) < 1e-3


def test_a_seed_leaves_torchs_own_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = lk.eva(llama(), EVA, text(), seed=5)
    torch.manual_seed(3)
    model = llama()
    torch.manual_seed(3)
    lk.eva(model, EVA, text(), seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert isinstance(one, lk.AdapterState)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rho": 0.5}, ConfigError, "rho is at least 1"),
        ({"tau": 0.0}, ConfigError, "tau in"),
        ({"analysis": "ica"}, ConfigError, "analysis is 'pca' or 'svd'"),
        ({"keep": "rank"}, ConfigError, "keep 'scale' or 'alpha'"),
        ({"batches": []}, ConfigError, "0 batches did not hold as many.*saw 0 vectors"),
        ({"batches": text(1, 1, 2)}, ConfigError, r"takes 28 directions.*1 batches.*saw 2 vectors"),
        ({"adapter": lk.LoRA(r=2)}, ConfigError, r"Nothing here starts.*LoRA\(init='eva'\)"),
        (
            {"targets": ["embed_tokens"]},
            UnsupportedTargetError,
            "'model.embed_tokens'.*vectors.*embedding target",
        ),
    ],
    ids=["rho", "tau", "analysis", "keep", "nothing", "few", "method", "embedding"],
)
def test_what_eva_cannot_do(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = llama()
    arguments = {"adapter": EVA, "batches": text(), **settings}
    with pytest.raises(error, match=message):
        lk.eva(model, **arguments)


def test_weights_that_another_module_reads_show_no_inputs() -> None:
    model = nn.MultiheadAttention(6, 2)
    for measure in (lk.eva, functools.partial(lk.lora_ga, loss=lambda m, x: m(x, x, x)[0].sum())):
        method = EVA if measure is lk.eva else GA
        with pytest.raises(UnsupportedTargetError, match=r"'out_proj'.*read by another module"):
            measure(model, method, [torch.randn(3, 2, 6)], ["out_proj"])  # type: ignore[operator]


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------
def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the weights, by autograd."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that the starts are made from."""
    seen: list[Tensor] = []
    real = calibrate.lora_ga_factors

    def noting(G: Tensor, r: int, **settings: Any) -> tuple[Tensor, Tensor]:
        seen.append(G)
        return real(G, r, **settings)

    monkeypatch.setattr(calibrate, "lora_ga_factors", noting)
    return seen


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_the_gradient_is_that_of_autograd_and_no_parameter_gets_one(
    build: Callable[[], nn.Module],
    passes: int,
    measured: list[Tensor],
    untouched: Callable[[nn.Module], None],
) -> None:
    model, batches = build().train(), text()
    list(model.parameters())[3].requires_grad_(False)
    untouched(model)
    state = lk.lora_ga(model, GA, iter(batches), passes=passes, seed=0)
    expected = gradients(model, batches)
    paths = [t.path for t in lk.find(model)]
    paths = [path for part in range(passes) for path in paths[part::passes]]
    assert len(measured) == len(paths) == len(state.spec.methods)
    for path, G in zip(paths, measured, strict=True):
        want = expected[f"{path}.weight"]
        torch.testing.assert_close(G, want.T if build is gpt2 else want, rtol=1e-4, atol=1e-6)
    for group in state.tensors.values():
        length = group["lora_B"].shape[0] ** 0.5 / 16
        torch.testing.assert_close(
            group["lora_A"] @ group["lora_A"].mT, length * torch.eye(2), rtol=0, atol=1e-5
        )
        assert torch.equal(group["start_A"], group["lora_A"])
    twin = copy.deepcopy(model).eval()
    before = twin(**batches[0]).logits
    lk.attach(twin, state, trainable=True)
    assert torch.equal(twin(**batches[0]).logits, before)


@pytest.mark.parametrize(
    "kind", ["linear", "hfconv1d", "embedding", "conv1d-same", "conv2d", "conv2d-groups", "linear-slice"]
)
def test_every_kind_of_layer_that_a_hook_reaches(kind: str, measured: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, x = KINDS[kind].build(), KINDS[kind].inputs()
    x = x.float() if x.is_floating_point() else x
    weight = torch.randn_like(model(x))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * weight).sum()

    (target,) = lk.find(model, [KINDS[kind].names])
    twin = copy.deepcopy(model)
    loss(twin, x).backward()
    lk.lora_ga(model, lk.LoRA(r=1, init="lora_ga"), [x], [KINDS[kind].names], loss=loss, seed=0)
    torch.testing.assert_close(measured[0], target.to_matrix(twin.layer.weight.grad), rtol=1e-4, atol=1e-5)


def test_a_quantised_base_will_do(measured: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, batches = llama(), text()
    lk.quantize(model, "nf4")
    dense = copy.deepcopy(model)
    lk.dequantize(dense)
    lk.lora_ga(model, GA, batches, ["q_proj"], seed=0)
    expected = gradients(dense, batches)
    torch.testing.assert_close(
        measured[1], expected["model.layers.1.self_attn.q_proj.weight"], rtol=1e-3, atol=1e-5
    )


def test_a_half_precision_gradient_is_summed_in_float32(measured: list[Tensor]) -> None:
    model, batches = llama().bfloat16(), text()
    state = lk.lora_ga(model, GA, batches, ["down_proj"], seed=0)
    assert {G.dtype for G in measured} == {torch.float32}
    assert {t.dtype for _, _, t in state.all_tensors()} == {torch.float32}


def test_activation_checkpointing_is_seen_through(measured: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(5, 6)

    def loss(model: nn.Module, x: Tensor, reentrant: bool | None = None) -> Tensor:
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        return y.square().sum()

    for reentrant in (None, False):
        lk.lora_ga(model, GA, [x], loss=functools.partial(loss, reentrant=reentrant), seed=0)
    for plain, again in zip(measured[:2], measured[2:], strict=True):
        torch.testing.assert_close(again, plain)


def test_the_first_step_follows_the_full_gradient_more_closely_than_a_usual_start() -> None:
    """The cosine between the change of the weights after one step of descent and the gradient of the weights."""
    torch.manual_seed(0)
    model, batches = llama(), text()
    full = gradients(model, batches[:1])
    cosines = []
    for init in ("lora_ga", "kaiming"):
        twin = copy.deepcopy(model)
        method = lk.LoRA(r=2, alpha=4, scaling="rslora", init=init)
        adapter = lk.lora_ga(twin, method, batches[:1], seed=0) if init == "lora_ga" else method
        lk.attach(twin, adapter, trainable=True, seed=0 if init == "kaiming" else None)
        twin(**batches[0]).loss.backward()
        with torch.no_grad():
            for p in lk.trainable(twin).values():
                p.sub_(1e-3 * p.grad)  # type: ignore[operator]
        state = lk.extract(twin)
        changes = {
            path: method.delta(path, state.tensors[path])  # type: ignore[attr-defined]
            for path, method in state.spec.methods.items()
        }
        together = torch.cat([-c.flatten() for c in changes.values()])
        wanted = torch.cat([full[f"{path}.weight"].flatten() for path in changes])
        cosines.append(float(F.cosine_similarity(together, wanted, dim=0)))
    assert cosines[0] > 1.5 * cosines[1] > 0


class _DeadEnd(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x)))).detach() + self.norm.weight.sum()


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (Mlp, {"passes": 0}, ConfigError, "passes counts"),
        (Mlp, {"gamma": -1.0}, ConfigError, "gamma divides"),
        (Mlp, {"direction": "up"}, ConfigError, "direction is one of"),
        (Mlp, {"adapter": lk.LoRA(r=2)}, ConfigError, r"LoRA\(init='lora_ga'\)"),
        (Mlp, {"adapter": lk.LoRA(r=3, init="lora_ga")}, ConfigError, r"4 x 8 matrix has 4: choose r <= 2"),
        (Mlp, {"loss": None}, ConfigError, "Mlp computes no loss of its own.*pass loss="),
        (_DeadEnd, {}, ConfigError, "gradient of the weight of 'fc1', and there was none in 1 batches"),
        (Mlp, {"loss": lambda m, x: m(x).sum() * 0}, ConfigError, "there was none"),
        (Mlp, {"loss": lambda m, x: m(x).sum() * float("inf")}, ConfigError, "NaN or an infinity"),
        (Mlp, {"batches": []}, ConfigError, "none in 0 batches"),
    ],
)
def test_what_lora_ga_cannot_do(
    model: type[Mlp],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    untouched: Callable[[nn.Module], None],
) -> None:
    base = model()
    untouched(base)
    arguments = {
        "adapter": GA, "batches": [torch.randn(5, 6)], "loss": lambda m, x: m(x).square().sum(), **settings
    }  # fmt: skip
    with pytest.raises(error, match=message):
        lk.lora_ga(base, **arguments)


# ---- both -----------------------------------------------------------------------------------------------------------
def measure(name: str, model: nn.Module, batches: Any) -> lk.AdapterState:
    if name == "eva":
        return lk.eva(model, EVA, batches, seed=0)
    return lk.lora_ga(model, GA, batches, loss=lambda m, x: m(x).square().sum(), seed=0)


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
@pytest.mark.parametrize("fails", ["batches", "model"])
def test_an_error_on_the_way_leaves_nothing_behind(
    name: str, fails: str, untouched: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mlp().train()
    model.norm.eval()
    untouched(model)

    def batches() -> Iterator[Tensor]:
        yield torch.randn(9, 6)
        if fails == "batches":
            raise RuntimeError("no more")
        yield torch.randn(9, 5)

    with pytest.raises(RuntimeError):
        measure(name, model, batches())


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_adapters_that_are_there_do_not_act_meanwhile(name: str) -> None:
    torch.manual_seed(0)
    model, batches = Mlp(), [torch.randn(40, 6)]
    expected = measure(name, model, batches)
    lk.attach(model.train(), lk.LoRA(r=2), name="there")
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_()
    found = measure(name, model, batches)
    assert found.spec.methods == expected.spec.methods
    for path, key, tensor in expected.all_tensors():
        assert torch.equal(found.tensors[path][key], tensor)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".there." in n)
    assert all(module.training for module in model.modules())
    lk.attach(model, found, name="new")
    lk.set_active(model, "there")
    lk.merge(model)
    with pytest.raises(MergeError, match="there is merged"):
        measure(name, model, batches)


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_the_adapter_can_be_saved_and_read(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Mlp()
    state = measure(name, model, [torch.randn(40, 6)])
    lk.save(state, tmp_path / "native", form="native")
    again = lk.read(tmp_path / "native")
    assert again.spec == state.spec
    lk.save(state, tmp_path / "auto")
    lk.load(model, tmp_path / "auto")
    assert lk.read(tmp_path / "auto").spec.info[name] == state.spec.info[name]
