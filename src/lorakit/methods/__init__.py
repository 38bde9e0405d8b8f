"""The methods, one a file. Importing this package registers them all."""

from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.bitfit import BitFit
from lorakit.methods.bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from lorakit.methods.dora import DoRA
from lorakit.methods.dylora import DyLoRA
from lorakit.methods.full import FullFineTuning
from lorakit.methods.ia3 import IA3
from lorakit.methods.input_dora import InputDoRA
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_c import LoRAC
from lorakit.methods.lora_fa import LoRAFA
from lorakit.methods.prefix import PrefixTuning
from lorakit.methods.prompt import PromptTuning
from lorakit.methods.token_rows import TokenRows
from lorakit.methods.vera import VeRA

__all__ = [
    "AdaLoRA",
    "BitFit",
    "DoRA",
    "DyLoRA",
    "FullFineTuning",
    "Houlsby",
    "IA3",
    "InputDoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAC",
    "LoRAFA",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "TokenRows",
    "VeRA",
]
