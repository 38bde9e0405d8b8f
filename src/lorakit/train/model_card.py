"""The card of a trained adapter: ``README.md`` beside its files, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lorakit.core import Method
from lorakit.models import BUILTINS
from lorakit.train.recipe import Recipe

if TYPE_CHECKING:
    from lorakit.attach import AttachReport

CARD = "README.md"
_MARK = "<!-- written by lorakit train; a card without this line is never replaced -->"
_PIPELINES = {
    "causal-lm": "text-generation",
    "dpo": "text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "embedding": "sentence-similarity",
    "image-classification": "image-classification",
}


def write_card(folder: Path, text: str) -> Path:
    """Write the card of an adapter, unless its folder holds one that a person wrote.

    Args:
        folder: The adapter's.
        text: From `card`.
    """
    path = folder / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    part = path.with_name(f".{CARD}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def card(
    recipe: Recipe,
    report: AttachReport,
    *,
    base: str,
    trained_on: Mapping[str, Any],
    outcome: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """The text of a card. It names no folder of the machine that it was made on.

    Args:
        recipe: What was trained.
        report: What was attached.
        base: The base model's public name.
        trained_on: Rows, tokens and the like of the training split.
        outcome: Name to value of what was measured.
        versions: Of the software.
    """
    methods = sorted({method.name for method in recipe.adapter.methods()})
    front: dict[str, Any] = {
        **({"base_model": base} if base and not base.startswith(("/", ".")) else {}),
        "library_name": "peft",
        "pipeline_tag": _PIPELINES.get(recipe.task, "text-generation"),
        "tags": [*methods, "lorakit"],
    }
    if base and base.startswith(("/", ".")):
        base = Path(base).name
    settings = recipe.train
    facts = {
        "base model": base,
        "method": ", ".join(map(_described, recipe.adapter.methods())),
        "targets": f"{len(report.sites)}: {_endings(report)}",
        "trained parameters": f"{report.trainable:,} beside the base's {report.base_parameters:,}",
        "learning rate": f"{settings.lr:g}, {settings.schedule}, warm-up {settings.warmup:g}",
        "seed": str(settings.seed),
        **{name.replace("_", " "): _number(value) for name, value in trained_on.items()},
        **{name.replace("_", " "): _number(value) for name, value in outcome.items() if value is not None},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
{_MARK}

# {recipe.adapter.name}

An adapter for `{base}`, trained with lorakit.

| | |
|---|---|
{table}

## How to use it

```python
import lorakit as lk
from lorakit.models import load_model

model = load_model("{base}")
lk.load(model, "path/to/this/folder")
```

Where the files are in PEFT's form, `peft.PeftModel.from_pretrained(model, "path/to/this/folder")` reads them too.
`lorakit merge {base} path/to/this/folder --out merged` makes a plain model of both.

Made with {used}.
"""


def public_name(name: str) -> str:
    """A base model's name for others: the hub id of a built-in one."""
    return BUILTINS[name].hub_id if name in BUILTINS else name


def _described(method: Method) -> str:
    inner = getattr(method, "inner", method)
    facts = [f"{name}={getattr(inner, name):g}" for name in ("r", "alpha") if hasattr(inner, name)]
    return f"{method.name} ({', '.join(facts)})" if facts else method.name


def _endings(report: AttachReport) -> str:
    endings = dict.fromkeys(site.path.rsplit(".", 1)[-1] for site in report.sites)
    return ", ".join(endings) if len(endings) <= 12 else f"{', '.join(list(endings)[:12])}, ..."


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
