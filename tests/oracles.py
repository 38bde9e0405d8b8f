"""What each method should compute: one dense float64 formula a method, written apart from the package.

An oracle takes the stock layer (unadapted, float64), the name of the parameter that is adapted, the method's settings
and its tensors, and returns the *stored* values that the layer should act with. The reference output is then whatever
the stock layer's own forward makes of these values, so stride, padding, scaling and the like are torch's business.
Nothing here comes from `lorakit` but the settings, which are read as plain numbers. Everything is differentiable, so
autograd through an oracle is the reference for gradients.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Values = dict[str, Tensor]
Oracle = Callable[[nn.Module, str, Any, Mapping[str, Tensor]], Values]


def product(module: nn.Module, parameter: str, A: Tensor, B: Tensor) -> Tensor:
    """``B A`` in the layout in which this layer stores its weight."""
    stored = module._parameters[parameter]
    assert stored is not None
    if parameter != "weight" or not isinstance(module, LAYERS):
        return _stack_product(A, B)
    if isinstance(module, nn.Linear):
        return torch.einsum("or,ri->oi", B, A)
    if isinstance(module, nn.Embedding):
        return torch.einsum("dr,rv->vd", B, A)
    if isinstance(module, CONVOLUTIONS):
        return _kernel_product(module, A, B)
    return torch.einsum("or,ri->io", B, A)  # transformers' Conv1D


def _stack_product(A: Tensor, B: Tensor) -> Tensor:
    """One matrix product for each index of the leading dimensions."""
    if A.dim() == 2:
        return torch.einsum("or,ri->oi", B, A)
    return torch.stack([_stack_product(a, b) for a, b in zip(A, B, strict=True)])


def _kernel_product(conv: nn.Module, A: Tensor, B: Tensor) -> Tensor:
    """Group by group and kernel position by kernel position: ``W[o, i, k] = sum_r B[o, r] A[r, i, k]``."""
    groups, kernel = int(conv.groups), tuple(conv.kernel_size)  # type: ignore[arg-type]
    inputs = int(conv.in_channels) // groups  # type: ignore[arg-type]
    blocks = []
    for g in range(groups):
        a, b = (A[g], B[g]) if groups > 1 else (A, B)
        a = a.reshape(a.shape[0], inputs, *kernel)
        block = torch.zeros(b.shape[0], inputs, *kernel, dtype=a.dtype)
        for position in itertools.product(*(range(k) for k in kernel)):
            at = (slice(None), slice(None), *position)
            block = block.index_put(
                tuple(_grid(block.shape, position)), torch.einsum("or,ri->oi", b, a[at]).reshape(-1)
            )
        blocks.append(block)
    return torch.cat(blocks)


def _grid(shape: torch.Size, position: tuple[int, ...]) -> list[Tensor]:
    """Indices of every (output, input) pair at one kernel position."""
    pairs = torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).reshape(-1, 2)
    return [pairs[:, 0], pairs[:, 1], *(torch.full((len(pairs),), k) for k in position)]


def lora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + s B A`` and ``b + s lora_bias``; Hu et al. 2021, Kalajdzievski 2023.

    With a start that PEFT takes from the base (Meng et al. 2024): ``(W - s B_0 A_0) + s B A``.
    """
    s = settings.alpha / {"lora": settings.r, "rslora": math.sqrt(settings.r)}[settings.scaling]
    base = module._parameters[parameter]
    if "start_A" in p:
        base = base - s * product(module, parameter, p["start_A"], p["start_B"])
    values = {parameter: base + s * product(module, parameter, p["lora_A"], p["lora_B"])}
    if settings.bias:
        bias = module._parameters["bias"]
        change = s * p["lora_bias"]
        values["bias"] = change if bias is None else bias + change
    return values


def adalora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + alpha / (r0 + 1e-5) B diag(E) A`` with the rank ``r0`` at the start; Zhang et al. 2023 and their code."""
    s = settings.alpha / (settings.init_r + 1e-5)
    change = product(module, parameter, p["lora_E"] * p["lora_A"], p["lora_B"])
    return {parameter: module._parameters[parameter] + s * change}


def dylora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + alpha / b B diag(active) A``, ``b`` of them active; Valipour et al. 2022 and their code."""
    active = p["dylora_active"]
    change = product(module, parameter, active.reshape(-1, 1) * p["lora_A"], p["lora_B"])
    return {parameter: module._parameters[parameter] + settings.alpha / active.sum() * change}


def ia3(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """Output features times ``l``, the bias too; or input features times ``l``; Liu et al. 2022, section 3.3."""
    stored, bias, gain = module._parameters[parameter], module._parameters.get("bias"), p["ia3_l"]
    assert stored is not None
    layer = parameter == "weight" and isinstance(module, LAYERS)
    if settings.side == "output":
        if not layer:
            return {parameter: gain[..., :, None] * stored}
        stored_out_first = isinstance(module, (nn.Linear, *CONVOLUTIONS))
        at = 0 if stored_out_first else 1
        scaled = torch.stack(
            [g * part for g, part in zip(gain.flatten(), stored.unbind(at), strict=True)], at
        )
        return {parameter: scaled} if bias is None else {parameter: scaled, "bias": gain.flatten() * bias}
    if layer and isinstance(module, CONVOLUTIONS):
        groups = stored.chunk(int(module.groups))  # type: ignore[arg-type]
        gains = gain.reshape(len(groups), -1)
        blocks = [torch.einsum("oi...,i->oi...", block, g) for block, g in zip(groups, gains, strict=True)]
        return {parameter: torch.cat(blocks)}
    if layer and not isinstance(module, nn.Linear):  # Conv1D
        return {parameter: torch.diag(gain) @ stored}
    return {parameter: gain[..., None, :] * stored}


def dora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``m V / |V|`` along each output feature, by default with the norm detached; Liu et al. 2024, section 4.3."""
    inner = ORACLES[settings.inner.name](module, parameter, settings.inner, p)
    V = inner[parameter]
    measured = V.detach() if settings.detach_norm else V
    if parameter != "weight" or not isinstance(module, LAYERS):  # (..., out, in)
        norm = measured.square().sum(-1, keepdim=True).sqrt()
        return {parameter: p["magnitude"].reshape(norm.shape) * V / norm}
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):  # (out, everything else)
        norm = measured.flatten(1).square().sum(1).sqrt().reshape(-1, *(1,) * (V.dim() - 1))
        return {parameter: p["magnitude"].reshape(norm.shape) * V / norm}
    norm = measured.square().sum(0).sqrt()  # Embedding (vocabulary, out) and Conv1D (in, out)
    return {parameter: V * (p["magnitude"] / norm)}


def dora_input(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``V m / |V|`` along each input channel, the norm detached; LyCORIS with ``wd_on_output=False``."""
    V = ORACLES[settings.inner.name](module, parameter, settings.inner, p)[parameter]
    measured, m = V.detach(), p["magnitude"]
    if parameter != "weight" or not isinstance(module, LAYERS):  # (..., out, in)
        norm = measured.square().sum(-2, keepdim=True).sqrt()
        return {parameter: m.reshape(norm.shape) * V / norm}
    if isinstance(
        module, CONVOLUTIONS
    ):  # (groups x out, channels, ...): a magnitude for each group's channels
        grouped = V.unflatten(0, (module.groups, -1))
        others = (1, *range(3, grouped.dim()))
        norm = measured.unflatten(0, (module.groups, -1)).square().sum(others, keepdim=True).sqrt()
        return {parameter: (m.reshape(norm.shape) * grouped / norm).flatten(0, 1)}
    dim = 0 if isinstance(module, nn.Linear) else 1  # Embedding (vocabulary, out) and Conv1D (in, out)
    norm = measured.square().sum(dim, keepdim=True).sqrt()
    return {parameter: m.reshape(norm.shape) * V / norm}


def full(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """The trained value itself; that of a slice is ``(rows, in)`` also where the layer stores its transpose."""
    stored = module._parameters[parameter]
    assert stored is not None
    value = p["value"][:, 0] if stored.dim() == 1 else p["value"]
    return {parameter: value if value.shape == stored.shape else value.mT}


def token_rows(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """The vector of token ``ids[k]`` is ``rows[k]``; a stored row, but in transformers' ``Conv1D`` a column."""
    transposed = not isinstance(module, (nn.Embedding, nn.Linear))
    table = module._parameters[parameter]
    assert table is not None
    vectors = list(table.T if transposed else table)
    for k, token in enumerate(settings.ids):
        vectors[token] = p["rows"][k]
    return {parameter: torch.stack(vectors, dim=1 if transposed else 0)}


def dense(module: nn.Module, parameter: str, change: Tensor) -> Tensor:
    """A stack of matrices ``(*batch, out, in)`` in the layout in which this layer stores its weight."""
    eye = torch.eye(change.shape[-2], dtype=change.dtype)
    return product(module, parameter, change, eye.expand(*change.shape[:-2], -1, -1))


def each(formula: Callable[..., Tensor], stacked: bool, *tensors: Tensor) -> Tensor:
    """A formula for one matrix, for every index of the leading dimension where there is one."""
    return (
        torch.stack([formula(*one) for one in zip(*tensors, strict=True)]) if stacked else formula(*tensors)
    )


def vera(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + diag(b) B diag(d) A`` with the first rows and columns of the shared pair; Kopiczko et al. 2023, eq. 2."""
    d, b = p["vera_lambda_d"], p["vera_lambda_b"]
    stored = module._parameters[parameter]
    assert stored is not None
    columns = stored.numel() // b.numel()

    def change(d: Tensor, b: Tensor) -> Tensor:
        return torch.diag(b) @ p["vera_B"][: len(b)] @ torch.diag(d) @ p["vera_A"][:, :columns]

    return {parameter: stored + dense(module, parameter, each(change, d.dim() > 1, d, b))}


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``W[o, c, k] = sum_ij core[i, j, k] rows[i, o] columns[j, c]``, unfolded."""
    return torch.einsum("ij...,io,jc->oc...", core, rows, columns).flatten(1)


def loha(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + s (B1 A1) * (B2 A2)`` entry by entry; Yeh et al. 2023, section 3."""
    parts = []
    for k in ("1", "2"):
        w_a, w_b, core = p[f"hada_w{k}_a"], p[f"hada_w{k}_b"], p.get(f"hada_t{k}")
        if core is None:
            parts.append(product(module, parameter, w_b, w_a))
        else:
            parts.append(dense(module, parameter, each(tucker, w_a.dim() > 2, core, w_a, w_b)))
    return {parameter: module._parameters[parameter] + settings.alpha / settings.r * parts[0] * parts[1]}


def lokr(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + s (W1 kron W2)``; LyCORIS has ``s = 1`` where both are full. Yeh et al. 2023, section 3."""
    s = settings.alpha / settings.r
    if settings.scaling == "lycoris" and "lokr_w1" in p and "lokr_w2" in p:
        s = 1.0
    stacked = (p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"]).dim() > 2
    W1 = (
        p["lokr_w1"] if "lokr_w1" in p else torch.einsum("...ar,...rc->...ac", p["lokr_w1_a"], p["lokr_w1_b"])
    )
    if "lokr_w2" in p:
        W2 = each(lambda w: w.flatten(1), stacked, p["lokr_w2"])
    elif "lokr_t2" in p:
        W2 = each(tucker, stacked, p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        W2 = torch.einsum("...br,...rd->...bd", p["lokr_w2_a"], p["lokr_w2_b"])
    change = dense(module, parameter, each(torch.kron, stacked, W1, W2))
    return {parameter: module._parameters[parameter] + s * change}


def lora_c(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + alpha / r reshape(B A)``: channels kept apart, or the product's memory read as the kernel (loralib)."""
    stored = module._parameters[parameter]
    assert stored is not None
    kernel = stored.shape[2:]
    rows = math.prod(kernel[: len(kernel) // 2])

    def change(A: Tensor, B: Tensor) -> Tensor:
        B, A = B.reshape(-1, rows, B.shape[1]), A.reshape(A.shape[0], stored.shape[1], -1)
        return torch.einsum("ouj,jcv->ocuv", B, A).flatten(1)

    if settings.reshape == "view":
        W = (p["lora_B"] @ p["lora_A"]).reshape(stored.shape)
    else:
        W = dense(module, parameter, each(change, p["lora_A"].dim() > 2, p["lora_A"], p["lora_B"]))
    return {parameter: stored + settings.alpha / settings.r * W}


def in_rows(
    rows: tuple[int, ...],
    oracle: Oracle,
    module: nn.Module,
    parameter: str,
    settings: Any,
    p: Mapping[str, Tensor],
) -> Values:
    """An oracle for a layer that has only these output rows, its values put where the rows are in the whole one."""
    index = torch.tensor(rows)
    transposed = isinstance(module, _conv1d_of_transformers())

    def dim(name: str, stored: Tensor) -> int:
        """The dimension of the outputs: the last of a vector or of a transposed matrix, else the last but one."""
        return -1 if stored.dim() == 1 or (transposed and name == "weight") else -2

    small = copy.copy(module)  # the same class and attributes, with fewer rows
    small._parameters = {
        name: None if stored is None else stored.index_select(dim(name, stored), index)
        for name, stored in module._parameters.items()
    }
    values = oracle(small, parameter, settings, p)
    placed: Values = {}
    for name, value in values.items():
        stored = module._parameters[name]
        whole = torch.zeros(module.out_features, dtype=value.dtype) if stored is None else stored  # type: ignore[arg-type]
        placed[name] = whole.index_copy(dim(name, value), index, value)
    return placed


def _conv1d_of_transformers() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, _conv1d_of_transformers())
ORACLES: dict[str, Oracle] = {
    "lora": lora,
    "dora": dora,
    "dora_input": dora_input,
    "full": full,
    "bitfit": full,
    "token_rows": token_rows,
    "adalora": adalora,
    "dylora": dylora,
    "lora_fa": lora,
    "ia3": ia3,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "lora_c": lora_c,
}


def mixed(module: nn.Module, changes: list[tuple[float, Values]]) -> Values:
    """``W + sum_i w_i (W_i - W)`` for each stored value that any of the changes names."""
    total: Values = {}
    for weight, values in changes:
        for name, value in values.items():
            base = module._parameters[name]
            start = torch.zeros_like(value) if base is None else base
            total[name] = total.get(name, start) + weight * (value - start)
    return total


def output(model: nn.Module, path: str, values: Values, x: Tensor) -> Tensor:
    """What the stock model computes with these values in the module at ``path``."""
    module = model.get_submodule(path)
    for name in values:
        if module._parameters[name] is None:  # a bias that the layer did not have
            module._parameters[name] = nn.Parameter(torch.zeros_like(values[name]), requires_grad=False)
    return functional_call(model, {f"{path}.{name}": value for name, value in values.items()}, (x,))


# ---- methods that define no weight: the whole output ---------------------------------------------------------------
def prefix(model: nn.Module, path: str, settings: Any, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Attention over ``[P_K; K]`` and ``[P_V; V]``, positions moved up by the length (Li and Liang 2021, 4.2)."""
    if settings.mlp:
        hidden = torch.tanh(p["embedding"] @ p["hidden"].T + p["hidden_bias"])
        keys = hidden @ p["out_k"].T + p["out_k_bias"]
        values = hidden @ p["out_v"].T + p["out_v_bias"]
    else:
        keys, values = p["prefix_k"], p["prefix_v"]
    model = copy.deepcopy(model)
    attention = model.get_submodule(path)

    def forward(hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> tuple[Tensor, None]:
        return attend(attention, hidden_states, position_embeddings, keys, values), None

    attention.forward = forward  # type: ignore[method-assign]
    positions = torch.arange(x.shape[1])[None] + settings.length
    return model.layer(input_ids=x, position_ids=positions, use_cache=False).last_hidden_state  # type: ignore[no-any-return, operator, union-attr]


def attend(
    attention: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor
) -> Tensor:
    """Head by head and row by row, over the given keys and values and those of the row's tokens."""
    modules = dict(attention.named_children())
    if "c_attn" in modules:
        q, k, v = modules["c_attn"](hidden).chunk(3, dim=-1)
    else:
        names = ("q_proj", "k_proj", "v_proj") if "q_proj" in modules else ("query", "key", "value")
        q, k, v = (modules[name](hidden) for name in names)
    width = keys.shape[1] // (
        k.shape[-1] // (getattr(attention, "head_dim", None) or attention.attention_head_size)
    )
    groups = q.shape[-1] // k.shape[-1]
    out = torch.zeros_like(q)
    seen = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool)
    if "query" not in modules:  # not an encoder
        seen = seen.tril()
    for row in range(hidden.shape[0]):
        for head in range(q.shape[-1] // width):
            at, kv = slice(head * width, (head + 1) * width), head // groups
            kv_at = slice(kv * width, (kv + 1) * width)
            own_q, own_k = q[row, :, at], k[row, :, kv_at]
            if rotation is not None:
                own_q, own_k = (_rotated(t, *(r[0] for r in rotation)) for t in (own_q, own_k))
            scores = own_q @ torch.cat([keys[:, kv_at], own_k]).T / math.sqrt(width)
            blocked = torch.cat([torch.zeros(len(seen), len(keys), dtype=torch.bool), ~seen], dim=1)
            weights = scores.masked_fill(blocked, -math.inf).softmax(-1)
            out[row, :, at] = weights @ torch.cat([values[:, kv_at], v[row, :, kv_at]])
    last = modules.get("o_proj", modules.get("c_proj"))
    return out if last is None else last(out)


def _rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair ``(t_i, t_{i + d/2})`` turned by its position's angle; Su et al. 2021."""
    half = t.shape[-1] // 2
    turned = torch.cat([-t[:, half:], t[:, :half]], dim=-1)
    return t * cos + turned * sin


def prompt(model: nn.Module, path: str, settings: Any, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model on ``[P; E(x)]``, read off at the tokens; Lester et al. 2021, section 2."""
    embedded = model.layer.get_input_embeddings()(x)  # type: ignore[operator, union-attr]
    together = torch.cat([p["prompt"].expand(len(x), -1, -1), embedded], dim=1)
    states = model.layer(inputs_embeds=together, use_cache=False).last_hidden_state  # type: ignore[operator, union-attr]
    tokens = states[:, settings.length :]
    if settings.pooled == "prompt" and "encoder" in path:
        tokens = torch.cat([states[:, :1], tokens[:, 1:]], dim=1)
    return tokens


Output = Callable[[nn.Module, str, Any, Mapping[str, Tensor], Tensor], Tensor]


def in_sequence(settings: Any, p: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``y + W2 f(W1 y + b1) + b2``; Houlsby et al. 2019, figure 2."""
    return y + bottleneck(settings, p, y)


def parallel(settings: Any, p: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``y + s (W2 f(W1 x + b1) + b2)``; He et al. 2021, table 1, with the biases of the authors' code."""
    return y + settings.scale * bottleneck(settings, p, x)


def bottleneck(settings: Any, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """One hidden unit at a time."""
    f = {
        "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "relu": lambda z: z.clamp_min(0),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "tanh": torch.tanh,
    }[settings.activation]
    out = p["up_bias"].expand(*x.shape[:-1], -1)
    for w, b, u in zip(p["down"], p["down_bias"], p["up"].unbind(1), strict=True):
        out = out + f((x * w).sum(-1, keepdim=True) + b) * u
    return out


LayerOutput = Callable[[Any, Mapping[str, Tensor], Tensor, Tensor], Tensor]
LAYER_OUTPUTS: dict[str, LayerOutput] = {
    "houlsby": in_sequence,
    "pfeiffer": in_sequence,
    "parallel": parallel,
}
"""The new output of a layer or block: the settings, the tensors, the input, the stock output."""


def changed_output(
    model: nn.Module, entry: str, path: str, change: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """The output when what ``path`` returns is changed, given the module, the input of ``entry`` and its output."""
    model = copy.deepcopy(model)
    seen: list[Tensor] = []

    def changed(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (change(module, seen[-1], out[0]), *out[1:])
        return change(module, seen[-1], out)

    model.get_submodule(entry).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    handle = model.get_submodule(path).register_forward_hook(lambda *call: changed(*call))
    assert handle is not None
    return model(x)


OUTPUTS: dict[str, Output] = {"prefix": prefix, "prompt": prompt}
"""The output of a model with one such adapter: the stock model, the path of its adapted module, the settings, the
tensors, the input."""
