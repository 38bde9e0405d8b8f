"""Every kind of target, each in the smallest model that has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

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
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = vectors
    module: str = "layer"
    parameter: str = "weight"
    names: str = "layer"
    rows: int = 0
    whole: bool = False
    ignored: int | None = None

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
    "norm": Kind(lambda: Host(nn.LayerNorm(IN)), names="layer.weight", whole=True),
}
