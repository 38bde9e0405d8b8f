"""Pure tensor mathematics of low-rank adaptation: no modules, no configuration, no files."""

from lorakit.ops.finite import all_finite
from lorakit.ops.low_rank import add_low_rank, add_product, transformed
from lorakit.ops.precision import own_precision
from lorakit.ops.row_norms import row_norms

__all__ = ["add_low_rank", "add_product", "all_finite", "own_precision", "row_norms", "transformed"]
