"""One or more canonical settings of every registered method: what the contracts are checked with."""

from __future__ import annotations

from dataclasses import dataclass

import lorakit as lk
from lorakit.core import Method


@dataclass(frozen=True)
class Setting:
    """A method with its settings.

    Attributes:
        method: The method.
        parameter: The parameter of the layer to name, for methods that adapt parameters; by default the kind's own.
    """

    method: Method
    parameter: str | None = None


SETTINGS: dict[str, Setting] = {
    "lora": Setting(lk.LoRA(r=2, alpha=3)),
    "rslora": Setting(lk.LoRA(r=2, alpha=3, scaling="rslora", init="gaussian")),
    "lorabias": Setting(lk.LoRA(r=2, alpha=3, bias=True)),
    "dora": Setting(lk.DoRA(lk.LoRA(r=2, alpha=3))),
    "dora_rslora": Setting(lk.DoRA(lk.LoRA(r=1, alpha=2, scaling="rslora"))),
    "full": Setting(lk.FullFineTuning()),
    "bitfit": Setting(lk.BitFit(), parameter="bias"),
    "token_rows": Setting(lk.TokenRows(ids=(4, 1))),
}
