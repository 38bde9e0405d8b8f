"""loralib's format (microsoft/LoRA): a state dict with ``lora_A`` and ``lora_B`` beside other trained parameters.

It keeps no alpha (``lora_alpha`` stands in the training script: 1 by default, 16 in the paper's RoBERTa runs), so it
has to be said. ``MergedLinear`` keeps the factors of q, k and v in one pair of tensors: ``A`` has ``r`` rows for each
adapted part and ``B`` has ``r`` columns; which parts they are has to be said too. They become slices of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.selection import split_part
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.formats.format import Format, Hints, Tensors, Written
from lorakit.io.formats.modules import plainest
from lorakit.io.peft_keys import Found
from lorakit.io.peft_rules import HEADS, TABLES
from lorakit.io.peft_whole import parameter_shape
from lorakit.io.strictness import Complaints, floating
from lorakit.methods import FullFineTuning, LoRA

_FACTOR = re.compile(r"(.+)\.lora_([AB])")
_ROWS = re.compile(r"(\d+):(\d+)")
_THIRDS = ("q", "k", "v")


def recognises(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether any key is a factor without ``.weight``."""
    return any(_FACTOR.fullmatch(key) for key in tensors)


def read(tensors: Tensors, metadata: Mapping[str, str], hints: Hints) -> AdapterState:
    """An adapter from a state dict of loralib.

    Raises:
        AdapterFileError: The alpha was not said, or the parts of a fused layer, or factors do not belong together.
    """
    complaints = Complaints(list(tensors), "loralib writes")
    groups: dict[str, dict[str, Found]] = {}
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        floating(key, tensor)
        if match := _FACTOR.fullmatch(key):
            groups.setdefault(match[1], {})[f"lora_{match[2]}"] = Found(key, tensor)
        elif not key:
            raise AdapterFileError(
                "The file has a tensor without a name, which no parameter of a model can be."
            )
        else:
            methods[key], shapes[key] = FullFineTuning(), parameter_shape(tensor)
            held[key] = {"value": tensor.reshape(methods[key].shapes(shapes[key])["value"])}
    if hints.alpha is None:
        raise AdapterFileError(
            "loralib's files keep no alpha: it stands in the training script as lora_alpha (1 unless it was set; 16 in "
            "the paper's RoBERTa runs). Say it: --alpha NUMBER."
        )
    for path, group in groups.items():
        complaints.missing += [f"{path}.{name}" for name in ("lora_A", "lora_B") if name not in group]
        if len(group) < 2:
            continue
        A, B = group["lora_A"].tensor, group["lora_B"].tensor
        if A.dim() != 2 or B.dim() != 2 or 0 in (*A.shape, *B.shape) or A.shape[0] % B.shape[1]:
            complaints.misshaped.append(
                f"{path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors"
            )
            continue
        r = B.shape[1]
        for name, rows, columns in _parts(path, A, B, hints.slots):
            methods[name] = LoRA(r=r, alpha=hints.alpha)
            leaf = path.rpartition(".")[2]
            kind = "embedding" if leaf in TABLES - HEADS and name == path else "linear"
            shapes[name] = Shape(kind, out=columns.shape[0], in_=rows.shape[1])  # type: ignore[arg-type]
            held[name] = {"lora_A": rows, "lora_B": columns}
    complaints.check()
    return AdapterState(AdapterSpec(methods, shapes), held)


def _parts(path: str, A: Tensor, B: Tensor, slots: tuple[bool, ...]) -> list[tuple[str, Tensor, Tensor]]:
    """The layer itself, or its adapted slices, with the factors of each."""
    on = A.shape[0] // B.shape[1]
    if on == 1:
        return [(path, A, B)]
    if sum(slots) != on or B.shape[0] % on:
        said = (
            f"--slots {','.join(str(int(s)) for s in slots)} says {sum(slots)}"
            if slots
            else "nothing says which"
        )
        raise AdapterFileError(
            f"{path!r} is a MergedLinear: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are the factors of "
            f"{on} of its parts, and {said}. Give loralib's enable_lora, such as --slots 1,0,1 for q and v of q, k, v."
        )
    out = B.shape[0] // on
    names = _THIRDS if len(slots) == 3 and path.rpartition(".")[2] == "c_attn" else None
    places = [at for at, adapted in enumerate(slots) if adapted]
    parts = [names[at] if names else f"{at * out}:{(at + 1) * out}" for at in places]
    pairs = zip(A.chunk(on), B.chunk(on), strict=True)
    return [(f"{path}[{part}]", a, b) for part, (a, b) in zip(parts, pairs, strict=True)]


def write(state: AdapterState, hints: Hints) -> Written:
    """A state dict of loralib.

    Raises:
        AdapterFileError: The format cannot hold it.
    """
    plain = state.plain()
    losses: list[str] = []
    tensors: dict[str, Tensor] = {}
    fused: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    alphas: set[float] = set()
    for path, method in plain.spec.methods.items():
        shape = plain.spec.shapes[path]
        if isinstance(method, FullFineTuning) and shape.kind == "parameter":
            tensors[path] = plain.tensors[path]["value"].reshape(shape.stored)
            continue
        method, p = plainest(path, method, shape, plain.parameters(path), losses)
        if (
            not isinstance(method, LoRA)
            or method.bias
            or shape.kind not in ("linear", "embedding")
            or shape.batch
        ):
            raise AdapterFileError(
                f"{path!r} is {method.name} on a {shape.kind} target; loralib's format holds LoRA of linear layers and "
                "embeddings, and whole parameters."
            )
        alphas.add(method.scale * method.r)
        layer, part = split_part(path)
        if part:
            fused.setdefault(layer, {})[_slot(path, part, shape)] = (p["lora_A"], p["lora_B"])
        else:
            tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = p["lora_A"], p["lora_B"]
    for layer, parts in fused.items():
        pairs = [parts[at] for at in sorted(parts)]
        if len(pairs) == 1 or len({(a.shape, b.shape, a.dtype, b.dtype) for a, b in pairs}) > 1:
            raise AdapterFileError(
                f"The slices of {layer!r} are not several of equal size and rank, as MergedLinear's factors are."
            )
        tensors[f"{layer}.lora_A"] = torch.cat([a for a, _ in pairs])
        tensors[f"{layer}.lora_B"] = torch.cat([b for _, b in pairs])
        losses.append(f"which parts are adapted: pass enable_lora with parts {sorted(parts)} to MergedLinear")
    if alphas:
        said = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
        losses.append(
            f"alpha: pass lora_alpha={said} to loralib" + (", each to its layer" * (len(alphas) > 1))
        )
    return Written(tensors, {}, list(dict.fromkeys(losses)))


def _slot(path: str, part: str, shape: Shape) -> int:
    """Which of the equal parts of a fused layer a slice is."""
    if part in _THIRDS:
        return _THIRDS.index(part)
    rows = _ROWS.fullmatch(part)
    if rows is None or int(rows[1]) % shape.out or int(rows[2]) - int(rows[1]) != shape.out:
        raise AdapterFileError(f"{path!r} is not one of equal parts of its layer, as MergedLinear's are.")
    return int(rows[1]) // shape.out


LORALIB = Format("loralib", "loralib (microsoft/LoRA): a state dict", recognises, read, write, "pickle")
