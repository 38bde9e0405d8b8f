"""A LoRA from two checkpoints: what fine-tuning changed, as factors. One tensor is in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.change import as_lora, parameter_shape
from lorakit.adapters.fit import Cut, Fitted, Residual, split
from lorakit.core import AdapterSpec, AdapterState, Method, Shape
from lorakit.errors import ConfigError, listing, near_matches
from lorakit.methods import FullFineTuning
from lorakit.ops import all_finite
from lorakit.ops.truncated_svd import Triplets, leading_triplets, leading_triplets_by_projection

EMBEDDINGS = (
    r"(?:.*\.)?(?:embed_tokens|wte|wpe|word_embeddings|position_embeddings|token_type_embeddings|embed_in)"
)
"""Modules that are taken for embedding tables, whose weight is stored as ``(tokens, width)``."""
CONV1D = r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)"
"""Modules of GPT-2's family that keep a linear layer's weight as ``(in, out)``."""
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Extracted:
    """The adapter, and what differs between the checkpoints that it does not hold.

    Attributes:
        fitted: The adapter with what was lost at each target.
        left_out: Names of parameters that differ and were left out, to the norm of their difference.
        same: How many tensors are equal bit for bit.
    """

    fitted: Fitted
    left_out: Mapping[str, float]
    same: int

    @property
    def state(self) -> AdapterState:
        """The adapter."""
        return self.fitted.state


def conv1d_of(*configs: Mapping[str, object]) -> str | None:
    """`CONV1D` where a model's ``config.json`` says that it is of GPT-2's family; None elsewhere."""
    return CONV1D if any(config.get("model_type") in _CONV1D_MODELS for config in configs) else None


def from_checkpoints(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    r: int | None = None,
    energy: float | None = None,
    targets: Collection[str] | None = None,
    embeddings: str = EMBEDDINGS,
    transposed: str | None = None,
    rest: str = "report",
    exact: bool = True,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> Extracted:
    """The difference of two checkpoints as a LoRA.

    Args:
        base: Parameter name to tensor; each is asked for once (`lorakit.io.checkpoint.Checkpoint` reads it then).
        tuned: The same of the tuned model.
        r: The most directions of a target.
        energy: The share of the squared norm to keep at each target, in (0, 1]. At least one of the two is needed.
        targets: Endings of module paths (``"q_proj"``, ``"layers.0.mlp.up_proj"``) to extract; by default every linear
            layer and convolution that differs. Embedding tables only where they are named.
        embeddings: A regular expression for the modules that are embedding tables.
        transposed: A regular expression for linear layers that are stored as ``(in, out)`` (GPT-2's family: `CONV1D`).
        rest: What becomes of other parameters that differ (norms, biases, tables): ``"report"`` in
            `Extracted.left_out`, or ``"save"`` as trained copies in the adapter.
        exact: Decompose exactly. ``False`` is faster on wide layers: subspace iteration (Halko et al. 2011), which
            needs ``r`` and finds a little less than the best; the residual tells what was lost in either case.
        base_name: The name of the base model, for the adapter's file.
        dtype: Of the factors; by default that of the tuned weights, at least float32 (a difference of bf16 weights is
            not a bf16 number).

    Raises:
        ConfigError: The checkpoints do not belong together, nothing differs, a tensor is not finite, or a setting makes
            no sense.
    """
    cut = Cut(r, energy)
    if not cut or rest not in ("report", "save") or (not exact and r is None):
        raise ConfigError(
            "from_checkpoints needs r or energy (r where exact=False), and rest='report' or 'save'; got "
            f"{r=}, {energy=}, {exact=}, {rest=}."
        )
    _check_names(base, tuned)
    endings, seen = list(targets or ()), set[str]()
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    residuals: dict[str, Residual] = {}
    left_out: dict[str, float] = {}
    same = 0
    for name in tuned:
        old, new = base[name], tuned[name]
        if old.shape != new.shape:
            raise ConfigError(
                f"{name!r} has the size {tuple(old.shape)} in the base and {tuple(new.shape)} in the tuned model: they "
                "are not of the same architecture, or its vocabulary grew."
            )
        module, _, last = name.rpartition(".")
        ending = next((e for e in endings if module == e or module.endswith(f".{e}")), None)
        shape = _shape(module, old, embeddings, transposed) if last == "weight" else None
        if ending is not None and shape is not None:
            seen.add(ending)
        if torch.equal(old, new):
            same += 1
            continue
        for who, tensor in (("base", old), ("tuned model", new)):
            if tensor.is_floating_point() and not all_finite(tensor):
                raise ConfigError(f"{name!r} of the {who} holds a NaN or an infinity.")
        chosen = shape is not None and (ending is not None if targets is not None else not shape.lookup)
        if not chosen:
            left_out[name] = float(new.to(torch.float64, copy=True).sub_(old).norm())
            if rest == "save" and new.is_floating_point():
                methods[name], shapes[name] = FullFineTuning(), parameter_shape(tuple(new.shape))
                tensors[name] = {"value": new.reshape(FullFineTuning().shapes(shapes[name])["value"]).clone()}
                del left_out[name]
            continue
        assert shape is not None
        kind = dtype or torch.promote_types(new.dtype, torch.float32)
        matrix = _matrix(new.to(torch.float64, copy=True).sub_(old), shape, module, transposed)
        A, B, residuals[module] = _factors(matrix, cut, exact)
        methods[module], tensors[module] = as_lora(A, B, None, scale=1.0, dtype=kind)
        shapes[module] = shape
    missed = [ending for ending in endings if ending not in seen]
    if missed:
        layers = {
            name.removesuffix(".weight").rsplit(".", 1)[-1] for name in tuned if name.endswith(".weight")
        }
        raise ConfigError(f"No layer ends in {missed[0]!r}.{near_matches(missed[0], sorted(layers))}")
    if not methods:
        raise ConfigError(
            f"Nothing that was asked for differs between the checkpoints: {same} tensors are equal"
            + (f", and these differ but are no targets: {listing(left_out)}." if left_out else ".")
        )
    state = AdapterState(AdapterSpec(methods, shapes, base_name, {}), tensors)
    return Extracted(Fitted(state, residuals), left_out, same)


def _check_names(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    odd = sorted(set(base) ^ set(tuned))
    if odd:
        where = "tuned model" if odd[0] in base else "base"
        raise ConfigError(
            f"The checkpoints do not have the same tensors; the {where} lacks {odd[0]!r}"
            + (
                f", and there are {len(odd) - 1} more differences: {listing(odd[1:])}."
                if len(odd) > 1
                else "."
            )
        )


def _shape(module: str, W: Tensor, embeddings: str, transposed: str | None) -> Shape | None:
    """What kind of layer a stored weight belongs to; None for what is no matrix."""
    if W.dim() < 2 or not W.is_floating_point():
        return None
    if W.dim() > 2:
        return Shape("conv", out=W.shape[0], in_=math.prod(W.shape[1:]), kernel=tuple(W.shape[2:]))
    if re.fullmatch(embeddings, module):
        return Shape("embedding", out=W.shape[1], in_=W.shape[0])
    if transposed and re.fullmatch(transposed, module):
        return Shape("linear", out=W.shape[1], in_=W.shape[0])
    return Shape("linear", out=W.shape[0], in_=W.shape[1])


def _matrix(difference: Tensor, shape: Shape, module: str, transposed: str | None) -> Tensor:
    if shape.kind == "conv":
        return difference.flatten(1)
    swapped = shape.lookup or (transposed is not None and re.fullmatch(transposed, module) is not None)
    return difference.mT if swapped else difference


def _factors(matrix: Tensor, cut: Cut, exact: bool) -> tuple[Tensor, Tensor, Residual]:
    if exact:
        triplets = leading_triplets(matrix, min(matrix.shape))
        return split(triplets, cut.rank(triplets.S))
    assert cut.r is not None
    most = min(cut.r, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    found = leading_triplets_by_projection(matrix.float(), most, generator=generator)
    triplets = Triplets(*(t.double() for t in found))
    norm = float(matrix.norm())
    kept = cut.rank(triplets.S) if cut.energy is None else _rank_of(triplets.S, cut.energy, norm)
    A, B, _ = split(triplets, kept)
    return A, B, Residual(kept, norm, float((matrix - B @ A).norm()))


def _rank_of(S: Tensor, energy: float, norm: float) -> int:
    """The least rank that holds the share of the whole norm, or all that were found."""
    enough = (S.square().cumsum(0) >= energy * norm**2).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(S)
