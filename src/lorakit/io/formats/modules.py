"""One layer's tensors as kohya and LyCORIS name them, and as a method holds them, both ways.

LoRA and LoCon (``lora_down``, ``lora_up``, ``lora_mid``), LoHa (``hada_*``), LoKr (``lokr_*``), each with ``alpha`` and
``dora_scale``. Sources: kohya-ss/sd-scripts; KohakuBlueleaf/LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.core.method import DeltaMethod, LowRankMethod, Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.io.peft_keys import Found
from lorakit.io.strictness import Complaints, floating
from lorakit.methods import DoRA, InputDoRA, LoHa, LoKr, LoRA
from lorakit.methods.decomposed import Decomposed
from lorakit.methods.lokr import FIRSTS, factorize

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
SUFFIXES = (DOWN, UP, MID, ALPHA, DORA, *_LOHA, *_LOKR)
NOT_READ = {
    "diff": "a whole difference from the base's weight (LyCORIS 'full'), which needs the base to become a parameter",
    "diff_b": "a difference from the base's bias, which needs the base to become a parameter",
    "w_norm": "a difference from a norm's weight, which needs the base to become a parameter",
    "b_norm": "a difference from a norm's bias, which needs the base to become a parameter",
    "oft_blocks": "an orthogonal change (OFT), which no method here holds",
    "oft_diag": "an orthogonal change (OFT), which no method here holds",
    "on_input": "LyCORIS's IA3, whose factors it keeps in another form",
}
Module = tuple[Method, Shape, dict[str, Tensor]]


def read_module(
    stem: str, path: str, group: Mapping[str, Found], known: tuple[int, ...], complaints: Complaints
) -> Module | None:
    """A layer's method, facts and tensors; None where something does not fit, which is noted.

    Args:
        stem: Where its keys start.
        path: What its target is called.
        group: The rest of each key, to what stood there.
        known: The size of the layer's weight; empty when it is not known.
        complaints: What does not fit.

    Raises:
        AdapterFileError: The layer holds something that an adapter cannot.
    """
    for name, found in group.items():
        if name in NOT_READ:
            raise AdapterFileError(f"{found.key} is {NOT_READ[name]}.")
        floating(found.key, found.tensor)
    tensors = {name: found.tensor for name, found in group.items() if name not in (ALPHA, DORA)}
    alpha = scalar(group[ALPHA]) if ALPHA in group else None
    kernel = known[2:] if len(known) > 2 else ()
    made: tuple[DeltaMethod, Shape, dict[str, Tensor]] | None
    try:
        if any(name in tensors for name in _LOHA):
            made = _read_loha(tensors, alpha, kernel)
        elif any(name in tensors for name in _LOKR):
            made = _read_lokr(tensors, alpha, kernel)
        elif not {DOWN, UP} <= set(tensors):
            complaints.missing += [f"{stem}.{name}" for name in (DOWN, UP) if name not in tensors]
            return None
        else:
            made = _read_lora(stem, tensors, alpha, complaints)
    except (ConfigError, KeyError, IndexError, ValueError) as error:
        missing = f"{stem}.{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise AdapterFileError(f"{path!r}: {missing}") from error
    if made is None:
        return None
    change, shape, held = made
    method: Method = change
    if DORA in group:
        axis, magnitude = _magnitude(group[DORA], shape)
        method, held = axis(inner=change), {**held, "magnitude": magnitude}
    want = method.shapes(shape)
    sizes = {name: tuple(t.shape) for name, t in held.items()}
    if want != sizes:
        odd = sorted(name for name in {*want, *sizes} if want.get(name) != sizes.get(name))
        complaints.misshaped.append(
            f"{stem}.{odd[0]} is {sizes.get(odd[0], 'missing')} where {method.name} of this layer has "
            f"{want.get(odd[0], 'nothing')}"
        )
        return None
    if known and (math.prod(known[1:]), known[0]) != (shape.in_, shape.out):
        complaints.misshaped.append(f"{stem} is for a layer of {shape}; {path} is {known}")
        return None
    return method, shape, held


def write_module(path: str, method: Method, shape: Shape, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: the rest of each key to its tensor. Takes what `plainest` gives.

    Raises:
        AdapterFileError: These formats have no words for the layer or the method.
    """
    if shape.kind not in ("linear", "conv") or shape.batch:
        what = (
            "a grouped or stacked weight"
            if shape.batch
            else f"{'an' if shape.kind[0] in 'aeiou' else 'a'} {shape.kind}"
        )
        raise AdapterFileError(f"{path!r} is {what}; this format holds linear layers and plain convolutions.")
    written: dict[str, Tensor] = {}
    if isinstance(method, Decomposed):
        ones = (1,) * len(shape.kernel)
        size = (shape.out, 1, *ones) if isinstance(method, DoRA) else (1, shape.channels, *ones)
        written[DORA] = p["magnitude"].reshape(size)
        method = method.inner
    if isinstance(method, LoRA):
        if method.bias:
            raise AdapterFileError(f"{path!r} has a bias in its LoRA, and this format keeps none.")
        ones = (1,) * len(shape.kernel)
        written[DOWN] = p["lora_A"].reshape(method.r, shape.channels, *shape.kernel)
        written[UP] = p["lora_B"].reshape(shape.out, method.r, *ones)
        alpha = method.scale * method.r if method.scaling != "lora" else method.alpha
    elif isinstance(method, (LoHa, LoKr)):
        written |= {name: p[name] for name in method.shapes(shape)}
        alpha = method.alpha
        if isinstance(method, LoKr) and {"lokr_w1", "lokr_w2"} <= set(written) and method.scaling == "peft":
            # LyCORIS takes 1 for the scale where both factors are whole.
            if method.scale != 1:
                written["lokr_w1"] = written["lokr_w1"] * method.scale
            alpha = float(method.r)
    else:
        raise AdapterFileError(
            f"{path!r} is adapted by {method.name}; this format holds LoRA, LoHa and LoKr, with or without DoRA."
        )
    written[ALPHA] = as_scalar(alpha)
    return written


def plainest(
    path: str, method: Method, shape: Shape, p: Mapping[str, Tensor], losses: list[str]
) -> tuple[Method, dict[str, Tensor]]:
    """The same change by a method that has a name outside lorakit: anything of low rank as the LoRA that it equals."""
    tensors = dict(p)
    if isinstance(method, Decomposed):
        inside = {name: t for name, t in p.items() if name != "magnitude"}
        inner, held = plainest(path, method.inner, shape, inside, losses)
        assert isinstance(inner, DeltaMethod)
        return type(method)(inner=inner), {**held, "magnitude": p["magnitude"]}
    if isinstance(method, LoRA):
        if method.dropout:
            losses.append(f"dropout={method.dropout:g}, which only training reads")
        if method.scaling != "lora":
            losses.append("the word rslora: alpha is written so that alpha / r is the same scale")
        return method, tensors
    if isinstance(method, LowRankMethod):
        A, B, scale = method.factors(shape, p)
        dtype = max((t.dtype for t in p.values()), key=lambda d: torch.finfo(d).bits)
        losses.append(f"the word {method.name}: each target is written as the LoRA that it equals")
        r = A.shape[-2]
        return LoRA(r=r, alpha=scale * r), {"lora_A": A.to(dtype), "lora_B": B.to(dtype)}
    return method, tensors


def scalar(found: Found) -> float:
    """A tensor of one number."""
    if found.tensor.numel() != 1:
        raise AdapterFileError(f"{found.key} must be one number; it is {tuple(found.tensor.shape)}.")
    value = float(found.tensor)
    if not math.isfinite(value) or value == 0:
        raise AdapterFileError(f"{found.key} is {value}: an alpha is a finite number other than zero.")
    return value


def as_scalar(value: float) -> Tensor:
    """A number as a tensor, in float32 where that holds it exactly.

    Raises:
        AdapterFileError: It is zero, which readers take for an alpha that is not set.
    """
    if value == 0:
        raise AdapterFileError("An alpha of zero would be read as one that is not set: leave the target out.")
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if float(narrow) == value else torch.tensor(value, dtype=torch.float64)


# ---- one method each
def _read_lora(
    stem: str, tensors: Mapping[str, Tensor], alpha: float | None, complaints: Complaints
) -> tuple[DeltaMethod, Shape, dict[str, Tensor]] | None:
    down, up = tensors[DOWN], tensors[UP]
    if MID in tensors:
        down = _joined_core(stem, down, tensors[MID])
    extra = sorted(set(tensors) - {DOWN, UP, MID})
    complaints.unexpected += [f"{stem}.{name}" for name in extra]
    kernel = tuple(down.shape[2:])
    r = down.shape[0] if down.dim() > 1 else 0
    if r == 0 or up.dim() != down.dim() or tuple(up.shape[1:]) != (r, *(1,) * len(kernel)):
        complaints.misshaped.append(
            f"{stem}: {DOWN} {tuple(tensors[DOWN].shape)} and {UP} {tuple(up.shape)} are no pair of factors"
        )
    if extra or complaints.misshaped:
        return None
    in_ = math.prod(down.shape[1:])
    shape = Shape("conv" if kernel else "linear", out=up.shape[0], in_=in_, kernel=kernel)
    held = {"lora_A": down.reshape(r, in_), "lora_B": up.reshape(up.shape[0], r)}
    return LoRA(r=r, alpha=alpha or float(r)), shape, held


def _joined_core(stem: str, down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's kernel in two steps as one: ``A[r, i, k] = sum_j mid[r, j, k] down[j, i]``."""
    if mid.dim() < 3 or mid.shape[1] != down.shape[0] or math.prod(down.shape[2:]) != 1:
        raise AdapterFileError(
            f"{stem}.{MID} {tuple(mid.shape)} does not lie between its factors ({DOWN} is {tuple(down.shape)})."
        )
    channels = down.reshape(down.shape[0], -1).double()
    joined = torch.einsum("rj...,ji->ri...", mid.double(), channels)
    return joined.to(torch.promote_types(down.dtype, mid.dtype))


def _read_loha(
    tensors: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]
) -> tuple[DeltaMethod, Shape, dict[str, Tensor]]:
    a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
    core = tensors.get("hada_t1")
    if core is not None:
        r, kernel = core.shape[0], tuple(core.shape[2:])
        out, in_ = a.shape[1], b.shape[1] * math.prod(kernel)
    else:
        (out, r), in_ = a.shape, b.shape[1]
    shape = Shape("conv" if kernel else "linear", out=out, in_=in_, kernel=kernel)
    return LoHa(r=r, alpha=alpha or float(r), tucker=core is not None), shape, dict(tensors)


def _read_lokr(
    tensors: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]
) -> tuple[DeltaMethod, Shape, dict[str, Tensor]]:
    split = "lokr_w1" not in tensors
    a, c = (
        (tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]) if split else tensors["lokr_w1"].shape
    )
    whole, core = tensors.get("lokr_w2"), tensors.get("lokr_t2")
    if whole is not None:
        (b, d), kernel = whole.shape[:2], tuple(whole.shape[2:])
        r = tensors["lokr_w1_b"].shape[0] if split else max(1, math.ceil(max(b, d) / 2))
    elif core is not None:
        b, d, r = tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1], core.shape[0]
        kernel = tuple(core.shape[2:])
    else:
        (b, r), columns = tensors["lokr_w2_a"].shape, tensors["lokr_w2_b"].shape[1]
        d = columns // math.prod(kernel)
    out, channels = a * b, c * d
    split_by = _factor((a, b), (c, d))
    if split_by is None:
        raise AdapterFileError(
            f"no factor splits {out} into {a} x {b} and {channels} into {c} x {d}, so LoKr cannot hold it"
        )
    shape = Shape("conv" if kernel else "linear", out=out, in_=channels * math.prod(kernel), kernel=kernel)
    method = LoKr(
        r=r,
        alpha=float(r) if whole is not None and not split else alpha or float(r),
        factor=split_by[0],
        first=split_by[1],
        decompose_both=split,
        scaling="lycoris",
        tucker=core is not None,
    )
    return method, shape, dict(tensors)


def _factor(rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, str] | None:
    """A factor by which both sizes are split so, and which number comes first; the defaults if they do."""
    sizes = math.prod(rows), math.prod(columns)
    if 0 in sizes:
        return None
    for first in FIRSTS:
        for factor in dict.fromkeys((-1, *rows, *columns)):
            if tuple(factorize(size, factor, first) for size in sizes) == (rows, columns):
                return factor, first
    return None


def _magnitude(found: Found, shape: Shape) -> tuple[type[DoRA] | type[InputDoRA], Tensor]:
    """``dora_scale`` and the method that it belongs to: along the outputs, or along the inputs as early LyCORIS had it.

    Which of the two is told by where the other axis is left as 1; of a vector by its length.

    Raises:
        AdapterFileError: It fits neither, or both.
    """
    size, ones = tuple(found.tensor.shape), (1,) * len(shape.kernel)
    outputs, inputs = (shape.out, 1, *ones), (1, shape.channels, *ones)
    if len(size) == 1 and size == (shape.out,) == (shape.channels,):
        raise AdapterFileError(
            f"{found.key} {size} may run along the {shape.out} outputs or along as many inputs, which are two "
            f"different functions. Save it as {outputs} (DoRA, wd_on_output=True) or as {inputs} (early LyCORIS)."
        )
    if size in (outputs, (shape.out,)):  # first, so that a layer of one input and one output has today's form
        return DoRA, found.tensor.reshape(shape.out)
    if size in (inputs, (shape.channels,)):
        return InputDoRA, found.tensor.reshape(shape.channels)
    raise AdapterFileError(
        f"{found.key} {size} fits neither the {shape.out} outputs nor the {shape.channels} inputs of its layer."
    )
