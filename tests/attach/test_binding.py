"""Bound parameters: layers whose weights are read and never called. The class changes, and nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import RoutingError, UnsupportedTargetError
from tests.attach.small_models import Mlp, fill, picture, with_adapters

ROWS = ["a", None, "b", "a"]


class Experts(nn.Module):
    """Two stacks of matrices, read one expert at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.relu(x @ self.up[e].T) @ self.down[e].T for e in range(3))  # type: ignore[return-value]


def attention(**settings: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings})


def tokens(rows: int = 4, length: int = 5) -> Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(1))


# ---- what a user can see ------------------------------------------------------------------------------------------
def test_classes_names_and_keys_look_the_same() -> None:
    model = nn.Sequential(Experts())
    keys, base = list(model.state_dict()), picture(model)
    with_adapters(model, "a", targets=["up", "down"])
    assert isinstance(model[0], Experts)
    assert (type(model[0]).__name__, type(model[0]).__module__) == ("Experts", __name__)
    assert repr(model).startswith("Sequential(\n  (0): Experts(")
    assert [k for k in model.state_dict() if "lorakit" not in k] == keys
    assert isinstance(model[0]._parameters["up"], nn.Parameter)
    assert dict(model.named_parameters())["0.up"] is model[0]._parameters["up"]
    lk.detach(model)
    assert picture(model) == base
    assert type(model[0]) is Experts


def test_reading_the_parameter_gives_the_adapted_value_under_the_present_route() -> None:
    model = with_adapters(Experts(), "a", "b", targets=["up"])
    base = model._parameters["up"]
    slot = model.lorakit.up
    for name in "ab":
        with lk.use(model, name):
            A, B = slot._modules[name].lora_A, slot._modules[name].lora_B
            torch.testing.assert_close(model.up, base + 8.0 * B @ A)
    with lk.use(model, None):
        assert model.up is base
    lk.merge(model, "a")
    assert isinstance(model.up, nn.Parameter)


def test_two_parameters_of_one_module_come_and_go_one_by_one() -> None:
    model = Experts()
    base = picture(model)
    x = torch.randn(4, 6)
    lk.attach(model, lk.LoRA(r=2), ["up"], name="a")
    fill(model)
    only_up = model(x)
    lk.attach(model, lk.LoRA(r=2), ["down"], name="b")
    fill(model, "b")
    assert torch.equal(model(x), only_up)
    with lk.use(model, ["a", "b"]):
        both = model(x)
    lk.merge(model, ["a", "b"])
    torch.testing.assert_close(model(x), both)
    lk.unmerge(model)
    lk.detach(model, "b")
    assert torch.equal(model(x), only_up)
    lk.detach(model)
    assert picture(model) == base


def test_pickle_and_deep_copy() -> None:
    model = with_adapters(nn.Sequential(Experts()), "a", targets=["up", "down"])
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert type(other[0]) is type(model[0])
        with torch.no_grad():
            other[0]._parameters["up"].zero_()
        assert not torch.equal(other(x), model(x))
        lk.detach(other)
        assert type(other[0]) is Experts


def test_a_new_parameter_may_be_assigned() -> None:
    model = with_adapters(Experts(), "a", targets=["up"])
    new = nn.Parameter(torch.zeros(3, 8, 6))
    model.up = new
    assert model._parameters["up"] is new
    torch.testing.assert_close(model.up, 8.0 * model.lorakit.up.a.lora_B @ model.lorakit.up.a.lora_A)
    lk.detach(model)
    assert model.up is new


def test_the_module_still_moves_casts_loads_and_zeroes_gradients() -> None:
    model = with_adapters(Experts(), "a", targets=["up"])
    state = copy.deepcopy(model.state_dict())
    model.double()
    assert model.up.dtype == torch.float64
    model.float().load_state_dict(state, strict=True)
    model(torch.randn(2, 6)).sum().backward()
    assert model.lorakit.up.a.lora_A.grad is not None
    model.zero_grad()
    assert model._parameters["up"].grad is None


def test_a_subclass_with_a_forward_of_its_own_is_bound() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * nn.functional.linear(input, self.weight, self.bias)

    model = nn.Sequential(Scaled(6, 4))
    x = torch.randn(3, 6)
    with_adapters(model, "a")
    assert lk.report(model).adapters[0].sites[0].binding == "parameter"
    W = model[0]._parameters["weight"]
    adapter = model[0].lorakit.weight.a
    want = 2 * nn.functional.linear(x, W + 8.0 * adapter.lora_B @ adapter.lora_A, model[0].bias)
    torch.testing.assert_close(model(x), want)
    assert isinstance(model[0], Scaled)
    lk.merge(model)
    torch.testing.assert_close(model(x), want)


def test_experts_are_built_once_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(Experts(), "a", targets=["up"])
    built = []
    fold = lk.LoRA.fold
    monkeypatch.setattr(lk.LoRA, "fold", lambda self, *args: built.append(1) or fold(self, *args))
    model(torch.randn(2, 6))
    assert built == [1]
    model(torch.randn(2, 6))
    assert built == [1, 1]


def test_rows_of_experts_equal_the_single_runs() -> None:
    model = with_adapters(Experts(), "a", "b", targets=["up", "down"])
    x = torch.randn(4, 6)
    want = []
    for i, row in enumerate(ROWS):
        with lk.use(model, row):
            want.append(model(x[i : i + 1]))
    with lk.use(model, rows=ROWS):
        torch.testing.assert_close(model(x), torch.cat(want))
        with pytest.raises(RoutingError, match="cannot be told apart"):
            model(torch.randn(9, 6))
        with pytest.raises(RoutingError, match="outside the forward pass"):
            _ = model.up


@pytest.mark.parametrize("container", [nn.Sequential, nn.ParameterList, nn.ParameterDict])
def test_containers_that_run_all_they_hold_are_refused(container: type[nn.Module]) -> None:
    if container is nn.Sequential:
        model = nn.Sequential(nn.Sequential())
        model[0].weight = nn.Parameter(torch.randn(4, 4))
        entry = "0.weight"
    elif container is nn.ParameterList:
        model, entry = nn.Sequential(nn.ParameterList([nn.Parameter(torch.randn(4, 4))])), "0.0"
    else:
        model, entry = nn.Sequential(nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 4))})), "0.w"
    before = picture(model)
    with pytest.raises(UnsupportedTargetError, match="module of its own"):
        lk.attach(model, lk.LoRA(r=2), [entry])
    assert picture(model) == before


# ---- nn.MultiheadAttention ----------------------------------------------------------------------------------------
def oracle(model: nn.MultiheadAttention, name: str | None, *args: Any, **kwargs: Any) -> Any:
    """A plain attention whose weights were changed by hand: W + 8 B A, once, for each projection."""
    plain = nn.MultiheadAttention(
        model.embed_dim, model.num_heads, bias=model.in_proj_bias is not None, batch_first=model.batch_first,
        kdim=model.kdim, vdim=model.vdim,
    )  # fmt: skip
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    for path, parameter in plain.named_parameters():
        owner = model.get_submodule(path.rpartition(".")[0])
        slot = getattr(owner._modules.get("lorakit"), path.rpartition(".")[2], None)
        if name is not None and slot is not None:
            adapter = slot._modules[name]
            parameter.data = parameter.data + 8.0 * adapter.lora_B.data @ adapter.lora_A.data
    return plain.train(model.training)(*args, **kwargs)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_first": False}, {"bias": False}, {"kdim": 6, "vdim": 4}],
    ids=["batch first", "length first", "no bias", "k and v differ"],
)
def test_attention_is_the_base_plus_one_delta_each(settings: dict[str, Any], grad: bool) -> None:
    model = with_adapters(nn.Sequential(attention(**settings)), "a", "b").eval()[0]
    q, k, v = tokens(), tokens()[..., : model.kdim], tokens()[..., : model.vdim]
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(grad):
            got = model(q, k, v)
            want = oracle(model, "a", q, k, v)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "3-D", "padding", "both"])
@pytest.mark.parametrize("need_weights", ["no", "mean", "heads"])
def test_rows_of_attention_equal_the_single_runs(
    batch_first: bool, mask: str, need_weights: str, grad: bool
) -> None:
    model = with_adapters(attention(batch_first=batch_first), "a", "b", targets="all-linear").double()
    x = tokens().double()
    masks = torch.rand(8, 5, 5, generator=torch.Generator().manual_seed(2)).double()  # (rows * heads, L, S)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()

    def run(which: slice) -> Any:
        kwargs: dict[str, Any] = {
            "need_weights": need_weights != "no",
            "average_attn_weights": need_weights == "mean",
        }
        if mask == "causal":
            kwargs["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(5).double()
        if mask in ("3-D", "both"):
            kwargs["attn_mask"] = masks[which.start * 2 : which.stop * 2]
        if mask in ("padding", "both"):
            kwargs["key_padding_mask"] = torch.zeros(4, 5).double().masked_fill(padding, float("-inf"))[which]
        part = x[which] if batch_first else x[which].transpose(0, 1)
        y, w = model(part, part, value=part, **kwargs)
        return (y if batch_first else y.transpose(0, 1)), w

    want = []
    for i, row in enumerate(ROWS):
        with torch.set_grad_enabled(grad), lk.use(model, row):
            want.append(run(slice(i, i + 1)))
    with torch.set_grad_enabled(grad), lk.use(model, rows=ROWS):
        y, w = run(slice(0, 4))
    torch.testing.assert_close(y, torch.cat([one for one, _ in want]))
    if need_weights == "no":
        assert w is None
    else:
        torch.testing.assert_close(w, torch.cat([one for _, one in want]))


def test_unbatched_attention_runs_and_refuses_rows() -> None:
    model = with_adapters(attention(), "a", "b", targets="all-linear")
    x = tokens()[0]
    torch.testing.assert_close(model(x, x, x)[0], oracle(model, "a", x, x, x)[0])
    with lk.use(model, rows=["a"] * 5), pytest.raises(RoutingError, match="cannot be told apart"):
        model(x, x, x)


def test_naming_the_attention_means_its_projections() -> None:
    model = nn.Sequential(attention())
    sites = lk.attach(model, lk.LoRA(r=2), ["0"]).sites
    assert [(s.path, s.binding) for s in sites] == [
        ("0.in_proj_weight", "parameter"),
        ("0.out_proj", "parameter"),
    ]
    model[0](tokens(), tokens(), tokens())
    assert lk.report(model).never_ran == ()


# ---- torch's fused encoder layer ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets", [["self_attn"], ["linear1"], "all-linear"], ids=["attention", "linear", "all"]
)
def test_the_fused_encoder_layer_never_runs_past_an_adapter(targets: Any) -> None:
    model = with_adapters(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), "a", "b", targets=targets
    )
    x = tokens()
    slow = model.train()(x).detach()
    model.eval()
    with torch.no_grad():
        assert (model(x) - slow).abs().max() < 1e-5
    torch.testing.assert_close(model(x), slow, atol=1e-5, rtol=1e-5)
    each = []
    for i, row in enumerate(ROWS):
        with torch.no_grad(), lk.use(model, row):
            each.append(model(x[i : i + 1]))
    with torch.no_grad(), lk.use(model, rows=ROWS):
        torch.testing.assert_close(model(x), torch.cat(each), atol=1e-5, rtol=1e-5)
    lk.merge(model, "a", permanent=True)
    lk.detach(model)
    with torch.no_grad():  # the fused kernel on plain merged weights
        torch.testing.assert_close(model(x), slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "targets", [["self_attn"], ["linear1", "linear2"], "all-linear"], ids=["attention", "linear", "all"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_packs_padded_rows(targets: Any) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    with_adapters(model, "a", "b", targets=targets)
    x = tokens()
    padding = torch.tensor([[0, 0, 0, 0, 1], [0] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()
    want = model.train()(x, src_key_padding_mask=padding).detach()
    model.eval()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], want[~padding], atol=1e-5, rtol=1e-5)
    with torch.no_grad(), lk.use(model, rows=ROWS), pytest.raises(RoutingError):
        model(x, src_key_padding_mask=padding)


def test_mixed_bound_and_hooked_targets_of_one_layer() -> None:
    model = Mlp()
    lk.attach(
        model, {"fc1": lk.LoRA(r=2), "fc1.bias": lk.FullFineTuning(), "norm.weight": lk.FullFineTuning()}
    )
    fill(model)
    x = torch.randn(3, 6)
    unmerged = model(x)
    lk.merge(model)
    torch.testing.assert_close(model(x), unmerged)
