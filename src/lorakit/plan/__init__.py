"""Planning: what a run will cost, from a config alone and with nothing downloaded."""

from lorakit.plan.architectures import Architecture, architecture, architectures
from lorakit.plan.counting import Counts, SiteCount, count
from lorakit.plan.plan import InferenceMemory, Plan, Run, TrainingMemory, plan

__all__ = [
    "Architecture",
    "Counts",
    "InferenceMemory",
    "Plan",
    "Run",
    "SiteCount",
    "TrainingMemory",
    "architecture",
    "architectures",
    "count",
    "plan",
]
