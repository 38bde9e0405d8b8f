"""PiSSA: the start is the best approximation of the weight, and the base stays whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.targets import find
from tests.contracts.kinds import KINDS, Host

MATRICES = ["linear", "hfconv1d", "embedding", "conv2d", "conv2d-groups", "conv3d", "mha-in", "experts"]


def started(method: lk.LoRA, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight, and the tensors that a LoRA starts with there."""
    torch.manual_seed(0)
    (target,) = find(KINDS[kind].build().double(), [KINDS[kind].names])
    return target.weight(), method.start(target, torch.Generator().manual_seed(0), {})


def best(W: Tensor, r: int) -> Tensor:
    """The best approximation of rank r."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_start_is_the_best_approximation_and_the_rest_has_the_next_singular_value(
    kind: str, scaling: str
) -> None:
    method = lk.LoRA(r=2, alpha=5, scaling=scaling, init="pissa")
    W, p = started(method, kind)
    change = method.scale * p["lora_B"] @ p["lora_A"]
    torch.testing.assert_close(change, best(W, 2), rtol=0, atol=1e-12)
    residual = W - change
    sigma = torch.linalg.svdvals(W)
    norms = torch.linalg.matrix_norm(residual, ord=2)
    torch.testing.assert_close(norms, sigma[..., 2], rtol=1e-10, atol=1e-14)
    assert (residual + change - W).abs().max() < 1e-15


@pytest.mark.parametrize("kind", MATRICES)
def test_both_factors_have_their_share_and_the_start_is_a_copy(kind: str) -> None:
    """``A Aᵀ = Bᵀ B = S_r / s``, as in equation 3 of the paper."""
    method = lk.LoRA(r=2, alpha=5, init="pissa")
    W, p = started(method, kind)
    S = torch.diag_embed(torch.linalg.svdvals(W)[..., :2] / method.scale)
    for gram in (p["lora_A"] @ p["lora_A"].mT, p["lora_B"].mT @ p["lora_B"]):
        torch.testing.assert_close(gram, S, rtol=0, atol=1e-12)
    for factor in "AB":
        assert torch.equal(p[f"start_{factor}"], p[f"lora_{factor}"])
        assert p[f"start_{factor}"].data_ptr() != p[f"lora_{factor}"].data_ptr()


def test_a_negative_scale_is_met_by_the_signs() -> None:
    method = lk.LoRA(r=2, alpha=-4, init="pissa")
    W, p = started(method, "linear")
    torch.testing.assert_close(method.scale * p["lora_B"] @ p["lora_A"], best(W, 2))


def test_no_scale_leaves_no_start() -> None:
    with pytest.raises(ConfigError, match="alpha=0 leaves nothing of the start at 'layer'"):
        started(lk.LoRA(r=2, alpha=0, init="pissa"), "linear")


def test_a_half_precision_weight_is_decomposed_in_float32() -> None:
    model = Host(nn.Linear(30, 20)).bfloat16()
    method = lk.LoRA(r=3, alpha=3, init="pissa")
    (target,) = find(model, ["layer"])
    p = method.start(target, None, {})
    assert {t.dtype for t in p.values()} == {torch.float32}
    torch.testing.assert_close(p["lora_B"] @ p["lora_A"], best(model.layer.weight.detach().float(), 3))
    x = torch.randn(4, 30, dtype=torch.bfloat16)
    y = model(x)
    lk.attach(model, method, ["layer"])
    assert torch.equal(model(x), y)


def test_the_fast_start_is_near_the_exact_one_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(120, 100)
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(U * 0.9 ** torch.arange(100.0) @ Vh)
    states = []
    for init, seed in (
        ("pissa", 0),
        ("pissa_niter_8", 0),
        ("pissa_niter_8", 0),
        ("pissa_niter_8", 1),
        ("pissa_niter_0", 0),
    ):
        model = Host(copy.deepcopy(layer))
        lk.attach(model, lk.LoRA(r=5, alpha=5, init=init), ["layer"], seed=seed)
        p = lk.extract(model).tensors["layer"]
        states.append((p["lora_A"], p["lora_B"] @ p["lora_A"]))
    (_, exact), (fast, near), (again, _), (other, _), (_, rough) = states
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-3)
    assert (rough - exact).abs().max() > 10 * (near - exact).abs().max()
    assert torch.equal(fast, again)
    assert not torch.equal(fast, other)


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "pisa"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"No init is called .*pissa"):
        lk.LoRA(init=name)


def test_two_adapters_share_one_base_that_nobody_changes() -> None:
    """PEFT's PiSSA takes its start from the base, so a second adapter would start from what the first has left."""
    torch.manual_seed(0)
    model = Host(nn.Linear(8, 6))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 8)
    base = model(x)
    for name in "ab":
        lk.attach(model, lk.LoRA(r=2, init="pissa"), ["layer"], name=name)
    assert torch.equal(model.layer.weight, before["layer.weight"])
    ours = {
        n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1]: p
        for n, p in model.named_parameters()
        if "lorakit" in n
    }
    assert torch.equal(ours["a.lora_A"], ours["b.lora_A"])
    with torch.no_grad():
        ours["a.lora_B"].add_(1)
    for route, same in (("a", False), ("b", True), (None, True)):
        with lk.use(model, route):
            assert torch.equal(model(x), base) is same
    lk.detach(model)
    assert torch.equal(model(x), base)
    assert model.state_dict().keys() == before.keys()


# ---- beside PEFT ----------------------------------------------------------------------------------------------------
def peft_trained(model: nn.Module, folder: Path, **config: Any) -> Any:
    """PEFT's adapter of ``layer`` with its start saved in ``folder / "start"``, then moved as training would."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer"], **config))
    kept = wrapped.peft_config["default"].init_lora_weights
    wrapped.peft_config[
        "default"
    ].init_lora_weights = True  # as PEFT's documentation says, or it would start anew
    wrapped.save_pretrained(folder / "start")
    wrapped.peft_config["default"].init_lora_weights = kept
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=draw) * (0 if "magnitude" in name else 1))
    return wrapped.eval()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 6), lambda: Conv1D(6, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_peft(layer: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = Host(layer())
    x = torch.randn(5, 8)
    theirs = peft_trained(
        copy.deepcopy(stock), tmp_path, r=2, lora_alpha=3, init_lora_weights="pissa",
        fan_in_fan_out=isinstance(stock.layer, Conv1D), **settings,
    )  # fmt: skip
    y = theirs(x)

    # The starts are the same.
    ours = copy.deepcopy(stock)
    lora = lk.LoRA(r=2, alpha=3, scaling="rslora" if "use_rslora" in settings else "lora", init="pissa")
    lk.attach(ours, lk.DoRA(lora) if "use_dora" in settings else lora, ["layer"])
    p = lk.extract(ours).tensors["layer"]
    start = lk.read(tmp_path / "start").tensors["layer"]
    torch.testing.assert_close(
        p["lora_B"] @ p["lora_A"], start["lora_B"] @ start["lora_A"], rtol=0, atol=1e-6
    )

    # What PEFT converts is what we read, and on the stock base it is PEFT's model.
    if "use_dora" not in settings:  # PEFT refuses to convert DoRA
        theirs.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
        model = copy.deepcopy(stock)
        lk.load(model, tmp_path / "converted")
        torch.testing.assert_close(model(x), y, rtol=0, atol=2e-6)

    # What PEFT leaves unconverted is exact with the start at hand, and trains on from there.
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(lk.LorakitError, match=r"changed the base weights.*initial="):
        lk.read(tmp_path / "trained")
    model = copy.deepcopy(stock)
    lk.load(model, tmp_path / "trained", initial=tmp_path / "start", trainable=True)
    torch.testing.assert_close(model(x), y, rtol=0, atol=2e-6)

    # And what we write is PEFT's on the stock base.
    import peft

    lk.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), y, rtol=0, atol=2e-6)
