"""lorakit: low-rank adaptation of PyTorch models, exact, fast and clear.

```python
import lorakit as lk

lk.attach(model, lk.LoRA(r=8, alpha=16), targets="all-linear", name="sql")
...                                      # train lk.trainable(model)
lk.save(model, "adapters/sql", name="sql")
lk.merge(model, "sql")
```

Importing the package imports nothing else, not even torch: each name is brought in when it is first used, so that
``lorakit --help`` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.attach import (
        AttachReport,
        LoftQReport,
        ModelReport,
        QuantizeReport,
        attach,
        checkpoint_contexts,
        dequantize,
        detach,
        eva,
        extract,
        loftq,
        lora_ga,
        merge,
        parameter_groups,
        quantize,
        report,
        set_active,
        trainable,
        training_processes,
        unmerge,
        use,
    )
    from lorakit.core import AdapterSpec, AdapterState
    from lorakit.errors import LorakitError
    from lorakit.io import read
    from lorakit.io.model_files import load, save
    from lorakit.methods import (
        IA3,
        AdaLoRA,
        BitFit,
        DoRA,
        DyLoRA,
        FullFineTuning,
        Houlsby,
        InputDoRA,
        LoHa,
        LoKr,
        LoRA,
        LoRAC,
        LoRAFA,
        ParallelAdapter,
        Pfeiffer,
        PrefixTuning,
        PromptTuning,
        TokenRows,
        VeRA,
    )
    from lorakit.targets import find

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "AdapterSpec",
    "AdapterState",
    "AttachReport",
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
    "LoftQReport",
    "LorakitError",
    "ModelReport",
    "ParallelAdapter",
    "Pfeiffer",
    "QuantizeReport",
    "PrefixTuning",
    "PromptTuning",
    "TokenRows",
    "VeRA",
    "attach",
    "checkpoint_contexts",
    "dequantize",
    "detach",
    "eva",
    "extract",
    "find",
    "load",
    "lora_ga",
    "loftq",
    "merge",
    "parameter_groups",
    "read",
    "quantize",
    "report",
    "save",
    "set_active",
    "trainable",
    "training_processes",
    "unmerge",
    "use",
]

_HOMES = {
    **dict.fromkeys(["AdapterSpec", "AdapterState"], "lorakit.core"),
    **dict.fromkeys(
        ["BitFit", "DoRA", "FullFineTuning", "InputDoRA", "LoRA", "TokenRows"], "lorakit.methods"
    ),
    **dict.fromkeys(["LoHa", "LoKr", "LoRAC", "VeRA"], "lorakit.methods"),
    **dict.fromkeys(["AdaLoRA", "DyLoRA", "IA3", "LoRAFA"], "lorakit.methods"),
    **dict.fromkeys(["Houlsby", "ParallelAdapter", "Pfeiffer"], "lorakit.methods"),
    **dict.fromkeys(["PrefixTuning", "PromptTuning"], "lorakit.methods"),
    **dict.fromkeys(["load", "save"], "lorakit.io.model_files"),
    "read": "lorakit.io",
    "find": "lorakit.targets",
    "LorakitError": "lorakit.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    # A method registers itself when it is imported, and files may name any of them.
    import_module("lorakit.methods")
    value = getattr(import_module(_HOMES.get(name, "lorakit.attach")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``lorakit.attach`` the function, where importing the subpackage of that name would put the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attach" and isinstance(value, ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
