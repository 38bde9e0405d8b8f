"""The contracts: targets and storages, methods, adapters as data, routes, and the selection of targets."""

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.mapping import FixedMapping
from lorakit.core.method import (
    DeltaMethod,
    Factors,
    InputMethod,
    KeyValueMethod,
    LowRankMethod,
    Method,
    WeightMethod,
)
from lorakit.core.process import Site, TrainingProcess
from lorakit.core.registry import METHODS, method_from_json, register
from lorakit.core.route import OFF, Mix, Route, Rows
from lorakit.core.target import Shape, Storage, Target

__all__ = [
    "METHODS",
    "OFF",
    "AdapterSpec",
    "AdapterState",
    "DeltaMethod",
    "Factors",
    "FixedMapping",
    "InputMethod",
    "KeyValueMethod",
    "LowRankMethod",
    "Method",
    "Mix",
    "Route",
    "Rows",
    "Shape",
    "Site",
    "Storage",
    "Target",
    "TrainingProcess",
    "WeightMethod",
    "method_from_json",
    "register",
]
