"""A LoRA from two checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import from_checkpoints
from lorakit.errors import ConfigError
from tests.adapters.states import extracted


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.q, self.c, self.norm = nn.Linear(8, 6), nn.Conv1d(6, 5, 3), nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.c(self.q(self.embed_tokens(x)).mT).mT)


def tuned(full: bool = False) -> tuple[Net, Net]:
    """A base and what a LoRA of rank 2 merged into it gives; with ``full`` all parameters moved at random."""
    torch.manual_seed(0)
    base, other = Net().double(), Net().double()
    other.load_state_dict(base.state_dict())
    if full:
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter))
    else:
        state = extracted(other, lk.LoRA(r=2), targets=["q", "c"])
        lk.attach(other, state, name="a")
        lk.merge(other, permanent=True)
    return base, other


def test_a_merged_lora_comes_back() -> None:
    base, other = tuned()
    found = from_checkpoints(base.state_dict(), other.state_dict(), r=2, base_name="b")
    assert set(found.state.tensors) == {"q", "c"}
    assert found.fitted.error < 1e-13
    assert (found.left_out, found.state.spec.base) == ({}, "b")
    assert found.same == len(base.state_dict()) - 2
    x = torch.tensor([[1, 2, 3, 4]])
    wanted = other(x)
    lk.attach(base, found.state, name="a")
    torch.testing.assert_close(base(x), wanted)
    by_energy = from_checkpoints(Net().double().state_dict(), other.state_dict(), energy=1 - 1e-12)
    assert by_energy.fitted.error < 1e-5


def test_what_a_rank_cannot_hold_is_told_and_the_rest_reported_or_saved() -> None:
    base, other = tuned(full=True)
    found = from_checkpoints(base.state_dict(), other.state_dict(), r=1)
    tail = torch.linalg.svdvals((other.q.weight - base.q.weight).detach())[1:].norm().item()
    assert found.fitted.residuals["q"].lost == pytest.approx(tail)
    assert set(found.left_out) == {"embed_tokens.weight", "q.bias", "c.bias", "norm.weight", "norm.bias"}
    assert found.left_out["q.bias"] == pytest.approx((other.q.bias - base.q.bias).norm().item())
    whole = from_checkpoints(
        base.state_dict(), other.state_dict(), r=8, targets=["q", "c", "embed_tokens"], rest="save"
    )
    assert not whole.left_out
    assert isinstance(whole.state.spec.methods["norm.bias"], lk.FullFineTuning)
    x = torch.tensor([[1, 2, 3, 4]])
    wanted = other(x)
    lk.attach(base, whole.state, name="a")
    torch.testing.assert_close(base(x), wanted)


def test_the_fast_way_is_nearly_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"q.weight": torch.randn(60, 50, generator=generator)}
    U, _, V = torch.linalg.svd(torch.randn(60, 50, generator=generator), full_matrices=False)
    new = {"q.weight": base["q.weight"] + U @ torch.diag(0.7 ** torch.arange(50.0)) @ V}
    exact = from_checkpoints(base, new, r=5).fitted.residuals["q"]
    fast = from_checkpoints(base, new, r=5, exact=False).fitted.residuals["q"]
    assert exact.lost <= fast.lost * (1 + 1e-6)
    assert fast.lost == pytest.approx(exact.lost, rel=1e-3)
    assert fast.norm == pytest.approx(exact.norm)


def test_each_tensor_is_asked_for_once() -> None:
    class Counting(dict[str, torch.Tensor]):
        asked: list[str]

        def __getitem__(self, name: str) -> torch.Tensor:
            self.asked.append(name)
            return super().__getitem__(name)

    base, other = (Counting(m.state_dict()) for m in tuned())
    base.asked, other.asked = [], []
    from_checkpoints(base, other, r=2)
    assert sorted(base.asked) == sorted(other.asked) == sorted(base)


def test_transposed_layers() -> None:
    W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = from_checkpoints(
        {"h.c_attn.weight": W}, {"h.c_attn.weight": 2 * W}, r=5, transposed=r"(?:.*\.)?c_attn"
    ).state
    assert (found.spec.shapes["h.c_attn"].out, found.spec.shapes["h.c_attn"].in_) == (7, 5)
    group = found.tensors["h.c_attn"]
    torch.testing.assert_close(group["lora_B"] @ group["lora_A"], W.mT)


def test_mistakes() -> None:
    base, other = (dict(m.state_dict()) for m in tuned())
    with pytest.raises(ConfigError, match="needs r or energy"):
        from_checkpoints(base, other)
    with pytest.raises(ConfigError, match="needs r or energy"):
        from_checkpoints(base, other, energy=0.5, exact=False)
    with pytest.raises(ConfigError, match=r"the tuned model lacks 'q\.weight'"):
        from_checkpoints(base, {k: v for k, v in other.items() if k != "q.weight"}, r=1)
    with pytest.raises(ConfigError, match=r"'q.weight' has the size \(6, 8\) in the base and \(7, 8\)"):
        from_checkpoints(base, {**other, "q.weight": torch.zeros(7, 8)}, r=1)
    with pytest.raises(ConfigError, match=r"'q\.weight' of the tuned model holds a NaN"):
        from_checkpoints(base, {**other, "q.weight": base["q.weight"] * float("nan")}, r=1)
    with pytest.raises(ConfigError, match="Nothing that was asked for differs"):
        from_checkpoints(base, base, r=1)
    with pytest.raises(ConfigError, match=r"No layer ends in 'qq'.*'q'"):
        from_checkpoints(base, other, r=1, targets=["qq"])
