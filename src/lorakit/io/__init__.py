"""Adapter files: PEFT's and our own, both ways, strict, and from the disk alone."""

from lorakit.io.adapter_directory import read, why_not_peft, write
from lorakit.io.checkpoint import Checkpoint
from lorakit.io.outline import Outline

__all__ = ["Checkpoint", "Outline", "read", "why_not_peft", "write"]
