"""BitFit: full fine-tuning of the biases alone.

Source: Ben Zaken et al. 2021 (arXiv 2106.10199).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorakit.core.registry import register
from lorakit.core.target import Target
from lorakit.methods.full import FullFineTuning


@register("bitfit")
@dataclass(frozen=True)
class BitFit(FullFineTuning):
    """Train every parameter called ``bias`` (or ``..._bias``), and nothing else.

    In a BERT layer of width d that is 11 d numbers. Targets other than biases are refused: use
    `FullFineTuning`.
    """

    default_targets: ClassVar[str] = "all-bias"

    def supports(self, target: Target) -> str | None:
        """Biases only."""
        if target.shape.kind == "parameter" and target.parameter.endswith("bias"):
            return None
        return "BitFit trains biases only: use FullFineTuning for other parameters"
