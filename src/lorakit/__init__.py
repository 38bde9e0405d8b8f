"""lorakit: low-rank adaptation of PyTorch models, exact, fast and clear.

```python
import lorakit as lk

lk.attach(model, lk.LoRA(r=8, alpha=16), targets="all-linear", name="sql")
...                                      # train lk.trainable(model)
lk.save(model, "adapters/sql", name="sql")
lk.merge(model, "sql")
```
"""

from __future__ import annotations

from lorakit.attach import (
    AttachReport,
    ModelReport,
    attach,
    checkpoint_contexts,
    detach,
    extract,
    merge,
    report,
    set_active,
    trainable,
    unmerge,
    use,
)
from lorakit.core import AdapterSpec, AdapterState
from lorakit.errors import LorakitError
from lorakit.methods import BitFit, DoRA, FullFineTuning, LoRA, TokenRows
from lorakit.targets import find

__version__ = "0.1.0"

__all__ = [
    "AdapterSpec",
    "AdapterState",
    "AttachReport",
    "BitFit",
    "DoRA",
    "FullFineTuning",
    "LoRA",
    "LorakitError",
    "ModelReport",
    "TokenRows",
    "attach",
    "checkpoint_contexts",
    "detach",
    "extract",
    "find",
    "merge",
    "report",
    "set_active",
    "trainable",
    "unmerge",
    "use",
]
