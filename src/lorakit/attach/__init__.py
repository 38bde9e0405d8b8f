"""The only code that touches a model: attaching, routing, merging, reporting."""

from lorakit.attach.active import set_active, use
from lorakit.attach.attach import attach, detach, extract, trainable
from lorakit.attach.calibrate import eva, lora_ga
from lorakit.attach.loftq import LoftQReport, loftq
from lorakit.attach.merge import merge, unmerge
from lorakit.attach.parameter_groups import parameter_groups
from lorakit.attach.processes import training_processes
from lorakit.attach.quantize import QuantizeReport, dequantize, quantize
from lorakit.attach.report import AttachReport, ModelReport, report
from lorakit.attach.routing import checkpoint_contexts

__all__ = [
    "AttachReport",
    "LoftQReport",
    "ModelReport",
    "QuantizeReport",
    "attach",
    "checkpoint_contexts",
    "dequantize",
    "detach",
    "eva",
    "extract",
    "lora_ga",
    "loftq",
    "merge",
    "parameter_groups",
    "quantize",
    "report",
    "set_active",
    "trainable",
    "training_processes",
    "unmerge",
    "use",
]
