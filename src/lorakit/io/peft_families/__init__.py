"""PEFT's types beside LoRA that keep tensors for each target, one file of rules a type."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.io.peft_families.adalora import AdaLoraFamily
from lorakit.io.peft_families.family import Family
from lorakit.io.peft_families.ia3 import Ia3Family
from lorakit.io.peft_families.lycoris import LoHaFamily, LoKrFamily
from lorakit.io.peft_families.vera import VeraFamily

FAMILIES: Mapping[str, Family] = {
    family.peft_type: family
    for family in (AdaLoraFamily(), Ia3Family(), LoHaFamily(), LoKrFamily(), VeraFamily())
}
"""By ``peft_type``."""

__all__ = ["FAMILIES", "Family"]
