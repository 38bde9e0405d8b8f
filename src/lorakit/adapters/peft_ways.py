"""PEFT's own ways to combine, number for number, under names of their own; and LoraHub's, which is of the same kind.

PEFT's ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` work on ``A`` and on ``B`` apart, so
their product has cross terms ``B_i A_j`` that no weighted sum of the changes has. Its ``..._svd`` forms work on the
changes, and elect signs from the unweighted ones. Reproduced as of PEFT 0.21 (`add_weighted_adapter`, from the same
seed too), but for one thing: PEFT keeps the rsLoRA scaling of the first adapter on a result that is already scaled.
Of a single adapter PEFT makes the linear form, whatever is asked for; here what is asked for is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.adapters.fit import Residual
from lorakit.adapters.together import Together
from lorakit.core import AdapterState
from lorakit.errors import ConfigError
from lorakit.methods import LoRA
from lorakit.ops.truncated_svd import Triplets

_KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
WAYS: Mapping[str, str] = {
    **{f"peft_{kind}": f"PEFT's {kind!r}: on A and on B apart, with cross terms" for kind in _KINDS},
    "peft_svd": "PEFT's 'svd': the weighted sum, formed and cut to r",
    **{f"peft_{kind}_svd": f"PEFT's '{kind}_svd': on the changes, cut to r" for kind in _KINDS[1:]},
}


def check(together: Together, weights: Sequence[float], how: str) -> None:
    """Refuse what PEFT has no rule for.

    Raises:
        ConfigError: A method is not a plain LoRA, or ranks (for LoraHub also scales) differ where they must not.
    """
    apart = not how.endswith("svd")
    for path in together.shapes:
        found = [together.states[i].spec.methods[path] for i in together.holders(path)]
        for method in found:
            if type(method) is not LoRA or method.bias or method.subtracted:
                raise ConfigError(
                    f"{how} is defined for plain LoRA without a bias of its own; {path!r} has {method}. Use 'sum', or "
                    "state.plain() first for a start that is subtracted."
                )
        ranks = {method.r for method in found if isinstance(method, LoRA)}
        if apart and len(ranks) > 1:
            raise ConfigError(
                f"{how} adds up the factors themselves, so all ranks must be equal; {path!r} has {sorted(ranks)}. "
                "Use 'sum', or bring them to one rank with resize."
            )


def factors(
    how: str,
    states: Sequence[AdapterState],
    weights: Sequence[float],
    path: str,
    holders: Sequence[int],
    r: int | None,
    density: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Residual | None]:
    """``A`` and ``B`` at one target, with scale 1, and for the forms that are cut what was lost."""
    loras = [states[i].spec.methods[path] for i in holders]
    scales = [lora.scale for lora in loras if isinstance(lora, LoRA)]
    As = [states[i].tensors[path]["lora_A"].detach() for i in holders]
    Bs = [states[i].tensors[path]["lora_B"].detach() for i in holders]
    own = [weights[i] for i in holders]
    if how == "lorahub":
        A, B = _lorahub(As, Bs, scales, own)
        return A, B, None
    kind = how.removeprefix("peft_").removesuffix("_svd")
    if not how.endswith("svd"):
        scaled = [w * s for w, s in zip(own, scales, strict=True)]
        on_A = [math.copysign(math.sqrt(abs(ws)), ws) if ws else 0.0 for ws in scaled]
        on_B = [math.sqrt(abs(ws)) for ws in scaled]
        return _merged(kind, As, on_A, density, generator), _merged(kind, Bs, on_B, density, generator), None
    changes = [(B @ A) * s for A, B, s in zip(As, Bs, scales, strict=True)]
    lookup = states[holders[0]].spec.shapes[path].lookup
    if lookup:  # PEFT draws and ranks an embedding's change as its table is stored
        changes = [change.mT.contiguous() for change in changes]
    change = _merged("linear" if kind == "svd" else kind, changes, own, density, generator)
    change = change.mT if lookup else change
    assert r is not None
    U, S, Vh = Triplets(*torch.linalg.svd(change, full_matrices=False))
    lost = float(S[..., r:].double().square().sum().sqrt())
    kept = min(r, S.shape[-1])
    return (
        Vh[..., :r, :],
        U[..., :r] * S[..., :r].unsqueeze(-2),
        Residual(kept, float(S.double().norm()), lost),
    )


def _lorahub(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``sum w_i A_i`` and ``sum w_i s_i B_i``: with one scale for all that is ``s (sum w B)(sum w A)``."""
    A = torch.stack([A.double() * w for A, w in zip(As, weights, strict=True)]).sum(0)
    B = torch.stack([B.double() * (w * s) for B, w, s in zip(Bs, weights, scales, strict=True)]).sum(0)
    return A, B


def _merged(
    kind: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float | None,
    generator: torch.Generator,
) -> Tensor:
    """One tensor of several, in their own dtype, with float32 weights as PEFT has them."""
    if kind in ("ties", "magnitude_prune"):
        assert density is not None
        tensors = [_largest(t, density) for t in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        assert density is not None
        tensors = [_drawn(t, density, generator) for t in tensors]
    stacked = torch.stack(tuple(tensors))
    weighted = stacked * torch.tensor(list(weights), dtype=torch.float32).view(-1, *[1] * (stacked.dim() - 1))
    if kind not in ("ties", "dare_ties"):
        return weighted.sum(0)
    majority = torch.where(stacked.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == majority
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The largest entries; as many as the density gives, rounded down."""
    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def _drawn(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries kept at random and divided by the density."""
    if density >= 1:
        return tensor
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    return tensor * torch.bernoulli(chances, generator=generator).to(tensor.device) / density
