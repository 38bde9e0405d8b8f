"""A decoder's norms, gates and attention in the compiled form of `lorakit.ops.fused` while it is trained.

What transformers writes as some twenty operations a block, each of which goes through memory and keeps something for
the backward pass, becomes four. A part is taken when it is made as that of Llama is (also Mistral, Qwen2, SmolLM2 and
whoever else is built so), and only if it then gives the outputs and gradients that it gave before on two short
documents. What is not taken runs as it did: other architectures, devices and dtypes, compiled models, parts that are
trained themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.binding import hooked_slots
from lorakit.attach.slot import output_hook
from lorakit.ops.fused import Reading, document_attention, read, read_gated, rms_norm, swiglu
from lorakit.ops.native.training import kernels
from lorakit.train.for_a_while import in_eval_mode, with_forwards
from lorakit.train.packing import NAME, pack, packed
from lorakit.train.watched import plain_calls, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]
_SMALLEST = 1e-20  # the derivative of a norm divides by its weights
_TOLERANCE = 1e-3
_PROBED = (9, 4)  # tokens of the documents of a probe


@contextmanager
def fused_layers(model: PreTrainedModel, *, packs: bool) -> Iterator[int]:
    """Run what is known of a model in its compiled form inside a ``with`` block, backward too.

    Args:
        model: With its adapters.
        packs: Whether its batches are packed: attention is taken for these alone.

    Yields:
        How many modules run so; 0 where nothing is known.
    """
    found = _compiled_forms(model, packs) if _worthwhile(model) else []
    with with_forwards(found):
        yield len(found)


def _worthwhile(model: PreTrainedModel) -> bool:
    weight = next(model.parameters())
    # Of another type are the parameters that FSDP has cut up.
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype is torch.float32
    return plain and kernels() is not None


def _compiled_forms(model: PreTrainedModel, packs: bool) -> list[tuple[nn.Module, Forward]]:
    """The modules whose compiled form gives the same, each with that form."""
    found: list[tuple[nn.Module, Forward]] = []
    with in_eval_mode(model), packed(model) if packs else nullcontext():
        for module in model.modules():
            known = _known(module, packs)
            if known is None:
                continue
            original = type(module).forward.__get__(module)
            compiled = partial(_unless_traced, known.form, module, original)
            if _same(original, compiled, known):
                found.append((module, compiled))
    return found


def forms_by_looks(model: nn.Module, *, packs: bool, length: int) -> list[tuple[nn.Module, Forward]]:
    """The modules of a model without numbers that would run compiled, each with that form; nothing can be probed there.

    Args:
        model: On the meta device.
        packs: Whether its batches are packed.
        length: Of each document.
    """
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        known = _known(module, packs)
        if known is None or (known.form is _attention and length > (_window(module) or length)):
            continue
        form = _attention_by_looks if known.form is _attention else known.form
        found.append((module, partial(form, module, type(module).forward.__get__(module))))
    return found


class _Known(NamedTuple):
    """A module that looks like one that has a compiled form.

    Attributes:
        form: The compiled form; called with the module, its own forward, and what that takes.
        width: Of the vectors that it reads.
        inputs: What else it takes, for a probe.
    """

    form: Forward
    width: int
    inputs: Mapping[str, Any] = MappingProxyType({})


def _known(module: Any, packs: bool) -> _Known | None:
    if not type(module).__module__.startswith("transformers.models.") or "forward" in module.__dict__:
        return None
    if _is_norm(module):
        return _Known(_norm, len(module.weight))
    if _is_gate(module):
        return _Known(_gate, module.gate_proj.in_features)
    if packs and _is_attention(module):
        return _Known(_attention, module.q_proj.in_features, _attention_inputs(module))
    return None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and hasattr(module, "variance_epsilon")
        and isinstance(weight, nn.Parameter)
        and weight.dtype is torch.float32
        and not weight.requires_grad
        and (weight.is_meta or bool((weight.abs() > _SMALLEST).all()))
    )


def _is_gate(module: nn.Module) -> bool:
    from transformers.activations import SiLUActivation

    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and isinstance(
        module.act_fn, (nn.SiLU, SiLUActivation)
    )


def _is_attention(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    sizes = ("head_dim", "scaling", "num_key_value_groups", "attention_dropout")
    return (
        type(module).__name__.endswith("Attention")
        and names == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and not list(module.named_parameters(recurse=False))
        and all(hasattr(module, name) for name in sizes)
    )


def _unless_traced(form: Forward, module: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Any:
    """A compiler of graphs gets what it can look into."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    return form(module, original, *args, **kwargs)


def _norm(module: Any, original: Forward, hidden_states: Tensor) -> Tensor:
    done = rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return original(hidden_states) if done is None else done


def _gate(module: Any, original: Forward, x: Tensor) -> Tensor:
    readings = _readings(module.gate_proj, module.up_proj, module.down_proj)
    done = None if readings is None else read_gated(x, *readings)
    if done is not None:
        return done
    gate, up = _outputs_of(x, module.gate_proj, module.up_proj)
    through = swiglu(gate, up)
    return _outputs_of(module.act_fn(gate) * up if through is None else through, module.down_proj)[0]


def _outputs_of(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What layers give for the same input."""
    readings = _readings(*layers)
    outputs = None if readings is None else read(x, readings)
    return [layer(x) for layer in layers] if outputs is None else outputs


def _readings(*layers: nn.Module) -> list[Reading] | None:
    """Layers and the low-rank changes that are all that is done to their outputs; None where something else is."""
    if not torch.is_grad_enabled() or not plain_calls():
        return None
    found = [_reading(layer) for layer in layers]
    return None if any(one is None for one in found) else found  # type: ignore[return-value]


def _reading(layer: nn.Module) -> Reading | None:
    slots = hooked_slots(layer)
    if type(layer) is not nn.Linear or len(slots) != 1 or watched(layer, [output_hook]):
        return None
    factors = slots[0].product_alone()
    if factors is None or not (factors.A.requires_grad and factors.B.requires_grad):
        return None
    return Reading(layer.weight, layer.bias, *factors)


def _attention(
    module: Any,
    original: Forward,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    borders = kwargs.get("cu_seq_lens_q")
    if (
        borders is not None
        and position_embeddings is not None
        and attention_mask is None
        and past_key_values is None
        and module.config._attn_implementation == NAME
        and not (module.training and module.attention_dropout)
        and not _narrower(module, borders)
    ):
        done = _documents(module, hidden_states, position_embeddings, borders)
        if done is not None:
            return _outputs_of(done, module.o_proj)[0], None
    # Where its products were made already they are made again, so that only whole calls are ours.
    return original(
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        **kwargs,
    )


def _documents(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], borders: Tensor
) -> Tensor | None:
    """What the attention of packed documents gives to its output layer."""
    q, k, v = _outputs_of(hidden_states, module.q_proj, module.k_proj, module.v_proj)
    cos, sin = position_embeddings
    return document_attention(q, k, v, cos, sin, borders, module.scaling)


def _attention_by_looks(
    module: Any,
    original: Forward,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `_attention`, of a row that is known to be packed."""
    borders = torch.empty(2, dtype=torch.int64, device=hidden_states.device)
    done = _documents(module, hidden_states, position_embeddings, borders)
    if done is None:
        return original(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
    return _outputs_of(done, module.o_proj)[0], None


def _window(module: Any) -> int | None:
    """How many tokens back a token sees, where that is limited."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None)


def _narrower(module: Any, borders: Tensor) -> bool:
    """Whether a token of some document sees less than all before it."""
    window = _window(module)
    return window is not None and int(borders.diff().max()) > window


def _same(original: Forward, compiled: Forward, known: _Known) -> bool:
    """Whether two forwards of a module give the same outputs, and gradients of their input."""
    x = torch.randn(1, sum(_PROBED), known.width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.enable_grad():
            (y, dx), (expected, expected_dx) = (
                _outputs(forward, x, known.inputs) for forward in (compiled, original)
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    return _near(y, expected) and _near(dx, expected_dx)


def _outputs(forward: Forward, x: Tensor, more: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    at = x.clone().requires_grad_()
    y = forward(at, **more)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y.detach(), torch.autograd.grad(y, at, dy)[0]


def _near(found: Tensor, expected: Tensor) -> bool:
    same_size = found.shape == expected.shape
    return same_size and float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _attention_inputs(module: Any) -> dict[str, Any]:
    """Two documents, each token turned somehow."""
    generator = torch.Generator().manual_seed(1)
    angles = 3 * torch.rand(1, sum(_PROBED), module.head_dim // 2, generator=generator)
    angles = torch.cat([angles, angles], dim=-1)
    batch = pack([list(range(n)) for n in _PROBED])
    borders = {name: batch[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None, **borders}
