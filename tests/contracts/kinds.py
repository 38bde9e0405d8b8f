"""Every kind of target, each in the smallest model that has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from tests.contracts.tiny_transformers import bert, gpt2, llama

BATCH, TOKENS, IN, OUT, VOCABULARY = 4, 3, 6, 8, 11


class Host(nn.Module):
    """A model around one layer, so that the layer has a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SelfAttention(nn.Module):
    """A model around ``nn.MultiheadAttention``, which reads the weights of its projections itself."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.layer.kdim]
        return self.layer(x, other, other, need_weights=False)[0]


class Matrix(nn.Module):
    """A bare two-dimensional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.T


class Experts(nn.Module):
    """A mixture of experts as one three-dimensional parameter, read expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.up[e].T for e in range(3)], dim=-2)


class ScaledLinear(nn.Linear):
    """A linear layer that overrides ``forward``: a hook on its output could not know what it does."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(2 * input, self.weight, self.bias))


class FeedForward(nn.Module):
    """A feed-forward block of another width inside; what it is called with stays its caller's."""

    def __init__(self, *, pair: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.pair = nn.Linear(IN, OUT), nn.Linear(OUT, IN), pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        y = self.down(torch.tanh(self.up(x)))
        return (y, "more") if self.pair else y


class Pair(nn.Module):
    """A model around a block that returns more than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = FeedForward(pair=True)

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.block(x)
        assert more == "more"
        return x + y


class Layer(nn.Module):
    """A layer whose feed-forward is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        self.norm = nn.LayerNorm(IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(torch.relu(self.fc1(x))))


def quantized(layer: nn.Module, storage: str) -> nn.Module:
    """A model around a layer in few bits: two blocks of NF4, the second one short."""
    host = Host(layer)
    lk.quantize(host, storage, ["layer"], block=32)
    return host


def of_bitsandbytes() -> nn.Module:
    """A model around bitsandbytes' 4-bit layer; it must not repack itself, which this size does not allow."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    return Host(layer if layer.weight.is_meta else layer.to("cpu"))


def vectors() -> Tensor:
    return torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)


def tokens() -> Tensor:
    x = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    x[:, 0] = torch.tensor([1, 4, 1, 4])  # those that TokenRows replaces
    return x


def image(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *size, dtype=torch.float64)


@dataclass(frozen=True)
class Kind:
    """One kind of target.

    Attributes:
        build: Makes the model; its adapted module is ``layer`` (``module`` if that is somewhere else).
        inputs: Makes its input, float64 or indices.
        module: Path of the module that owns the adapted parameter.
        parameter: Its name there.
        names: What the user writes for a method that adapts layers.
        rows: The dimension of the batch, in the input and in the output.
        whole: Whether only whole parameters can be adapted here (a vector is no matrix).
        ignored: An index whose looked-up row gets no gradient, see ``padding_idx`` of ``nn.Embedding``.
        part: For a slice, what stands in brackets behind the names.
        of: The output rows that it has.
        precision: What the layer itself computes to, where that is coarser than the dtype of its input.
        entry: For a block that begins in another module than it ends: that module's path.
        lossy: Whether storing a weight rounds it to codes, so that a merged model only nearly computes the same.
        adapts: Which methods can be asked: those of layers and parameters, or of this kind of place.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = vectors
    module: str = "layer"
    parameter: str = "weight"
    names: str = "layer"
    rows: int = 0
    whole: bool = False
    ignored: int | None = None
    part: str = ""
    of: tuple[int, ...] = ()
    entry: str = ""
    precision: float = 0.0
    lossy: bool = False
    adapts: str = "layer"

    @property
    def lookup(self) -> bool:
        """Whether the input is indices."""
        return self.inputs is tokens


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: Host(nn.Linear(IN, OUT))),
    "linear-nobias": Kind(lambda: Host(nn.Linear(IN, OUT, bias=False))),
    "linear-overridden": Kind(lambda: Host(ScaledLinear(IN, OUT))),
    "hfconv1d": Kind(lambda: Host(Conv1D(OUT, IN))),
    "embedding": Kind(lambda: Host(nn.Embedding(VOCABULARY, IN)), tokens),
    "embedding-padding": Kind(lambda: Host(nn.Embedding(VOCABULARY, IN, padding_idx=2)), tokens, ignored=2),
    "embedding-scaled": Kind(
        lambda: Host(Gemma3TextScaledWordEmbedding(VOCABULARY, IN, 0, embed_scale=2.5)), tokens, ignored=0
    ),
    "conv1d": Kind(lambda: Host(nn.Conv1d(4, 6, 3, stride=2, padding=1)), image(4, 9)),
    "conv1d-replicate": Kind(
        lambda: Host(nn.Conv1d(4, 6, 3, padding=2, padding_mode="replicate", bias=False)), image(4, 7)
    ),
    "conv1d-same": Kind(lambda: Host(nn.Conv1d(4, 6, 3, padding="same", dilation=2)), image(4, 7)),
    "conv2d": Kind(lambda: Host(nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0))), image(3, 5, 6)),
    "conv2d-reflect": Kind(
        lambda: Host(nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")),
        image(2, 7, 7),
    ),
    "conv2d-circular": Kind(
        lambda: Host(nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular")), image(2, 5, 4)
    ),
    "conv2d-groups": Kind(lambda: Host(nn.Conv2d(4, 6, 3, groups=2, padding=1)), image(4, 4, 4)),
    "conv3d": Kind(lambda: Host(nn.Conv3d(2, 4, (3, 1, 2), padding=(1, 0, 0))), image(2, 3, 3, 3)),
    "conv3d-groups": Kind(
        lambda: Host(nn.Conv3d(4, 4, 2, groups=2, dilation=2, bias=False)), image(4, 4, 3, 3)
    ),
    "mha-in": Kind(
        lambda: SelfAttention(nn.MultiheadAttention(IN, 2)),
        lambda: vectors().transpose(0, 1),
        parameter="in_proj_weight",
        names="layer.in_proj_weight",
        rows=1,
    ),
    "mha-out": Kind(
        lambda: SelfAttention(nn.MultiheadAttention(IN, 2, batch_first=True)),
        module="layer.out_proj",
        names="layer.out_proj",
    ),
    "mha-split": Kind(
        lambda: SelfAttention(nn.MultiheadAttention(IN, 2, kdim=4, vdim=4, batch_first=True)),
        parameter="k_proj_weight",
        names="layer.k_proj_weight",
    ),
    "matrix": Kind(lambda: Host(Matrix()), parameter="proj", names="layer.proj"),
    "experts": Kind(lambda: Host(Experts()), parameter="up", names="layer.up"),
    "linear-slice": Kind(
        lambda: Host(nn.Linear(IN, OUT)), names="layer[2:7]", part="2:7", of=(2, 3, 4, 5, 6)
    ),
    "linear-slice-interleaved": Kind(
        lambda: Host(nn.Linear(IN, 12)),
        names="layer[8:10,0:2,4:6]",
        part="0:2,4:6,8:10",
        of=(0, 1, 4, 5, 8, 9),
    ),
    "linear-slice-uneven": Kind(
        lambda: Host(nn.Linear(IN, OUT, bias=False)),
        names="layer[0:1,3:7]",
        part="0:1,3:7",
        of=(0, 3, 4, 5, 6),
    ),
    "hfconv1d-slice": Kind(lambda: Host(Conv1D(OUT, IN)), names="layer[3:8]", part="3:8", of=(3, 4, 5, 6, 7)),
    "mha-slice": Kind(
        lambda: SelfAttention(nn.MultiheadAttention(IN, 2, batch_first=True)),
        parameter="in_proj_weight",
        names="layer.in_proj_weight[k]",
        part="k",
        of=tuple(range(IN, 2 * IN)),
    ),
    "experts-slice": Kind(
        lambda: Host(Experts()), parameter="up", names="layer.up[4:8]", part="4:8", of=(4, 5, 6, 7)
    ),
    "ffn": Kind(lambda: Host(FeedForward()), adapts="module"),
    "ffn-tuple": Kind(lambda: Host(Pair()), module="layer.block", names="layer.block", adapts="module"),
    "ffn-span": Kind(
        lambda: Host(Layer()), module="layer.fc2", names="layer[fc1:fc2]", entry="layer.fc1", adapts="module"
    ),
    "norm": Kind(lambda: Host(nn.LayerNorm(IN)), names="layer.weight", whole=True),
    "linear-nf4": Kind(lambda: quantized(nn.Linear(IN, OUT), "nf4"), lossy=True),
    "linear-int8": Kind(lambda: quantized(nn.Linear(IN, OUT), "int8"), lossy=True),
    "hfconv1d-nf4": Kind(lambda: quantized(Conv1D(OUT, IN), "nf4"), lossy=True),
    "linear-nf4-slice": Kind(
        lambda: quantized(nn.Linear(IN, OUT), "nf4"), names="layer[2:5]", part="2:5", of=(2, 3, 4), lossy=True
    ),
    **{
        f"{adapts}-{name}": Kind(
            build,
            tokens,
            module=f"layer.{attention}",
            parameter=f"{keys}.weight",  # what a partner trains
            names=f"layer.{attention}" if adapts == "attention" else "",
            adapts=adapts,
        )
        for name, build, attention, keys in (
            ("llama", llama, "layers.1.self_attn", "k_proj"),
            ("gpt2", gpt2, "h.1.attn", "c_attn"),
            ("bert", bert, "encoder.layer.1.attention.self", "key"),
        )
        for adapts in ("attention", "model")
    },
}
if find_spec("bitsandbytes"):
    KINDS["linear-bnb4"] = Kind(of_bitsandbytes, precision=1e-5, lossy=True)
