"""The only place that knows layer classes: each as a stack of matrices, and how to find them."""

from lorakit.targets.convolution import ConvTarget
from lorakit.targets.dense import DenseStorage
from lorakit.targets.embedding import EmbeddingTarget
from lorakit.targets.find import find
from lorakit.targets.linear import LinearTarget, TransposedLinearTarget
from lorakit.targets.parameter import ParameterTarget
from lorakit.targets.recognise import candidates
from lorakit.targets.slices import SliceTarget

__all__ = [
    "ConvTarget",
    "DenseStorage",
    "EmbeddingTarget",
    "LinearTarget",
    "ParameterTarget",
    "SliceTarget",
    "TransposedLinearTarget",
    "candidates",
    "find",
]
