"""The methods, one a file. Importing this package registers them all."""

from lorakit.methods.bitfit import BitFit
from lorakit.methods.dora import DoRA
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA
from lorakit.methods.token_rows import TokenRows

__all__ = ["BitFit", "DoRA", "FullFineTuning", "LoRA", "TokenRows"]
