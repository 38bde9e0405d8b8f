"""Pure tensor mathematics of low-rank adaptation: no modules, no configuration, no files."""

from lorakit.ops.finite import all_finite
from lorakit.ops.hadamard import hadamard_low_rank
from lorakit.ops.int8 import quantize_int8
from lorakit.ops.kronecker import kronecker, kronecker_linear
from lorakit.ops.low_rank import add_lookup, add_low_rank, add_product, joined, transformed
from lorakit.ops.nf4 import quantize_nf4
from lorakit.ops.packed import Packed, packed_linear
from lorakit.ops.precision import own_precision
from lorakit.ops.ranges import Ranges
from lorakit.ops.row_norms import row_norms, row_squares

__all__ = [
    "Packed",
    "Ranges",
    "add_lookup",
    "add_low_rank",
    "add_product",
    "all_finite",
    "hadamard_low_rank",
    "joined",
    "kronecker",
    "kronecker_linear",
    "own_precision",
    "packed_linear",
    "quantize_int8",
    "quantize_nf4",
    "row_norms",
    "row_squares",
    "transformed",
]
