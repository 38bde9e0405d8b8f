"""Pure tensor mathematics of low-rank adaptation: no modules, no configuration, no files."""

from lorakit.ops.low_rank import add_low_rank, add_product, transformed
from lorakit.ops.row_norms import row_norms

__all__ = ["add_low_rank", "add_product", "row_norms", "transformed"]
