"""One run of `lorakit.train` that is watched: SmolLM2-135M, batches of 16 rows, losses and times of every step.

The variable LORAKIT_DATA names the folder that holds ``generate/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.train import Recipe

MODEL, RANK, ALPHA, ROWS, LR, SEED, LENGTH = "smollm2", 8, 16, 16, 5e-4, 0, 256
DATA = os.environ.get("LORAKIT_DATA", str(Path(__file__).resolve().parents[3] / "shared" / "data"))


def recipe_for(
    data: str,
    steps: int,
    folder: Path,
    *,
    targets: str = "all-linear",
    valid: int = 0,
    train: Mapping[str, Any] | None = None,
) -> Recipe:
    """What is trained.

    Args:
        data: A folder in ``generate/``.
        steps: Of the optimizer, each on 16 rows of their own.
        folder: Where the run's files go.
        targets: What is adapted.
        valid: Rows of the valid split; 0 for none.
        train: Settings of ``train`` that differ.
    """
    from lorakit.train import Recipe

    splits = {"train": ROWS * steps, **({"valid": valid} if valid else {})}
    return Recipe.from_mapping(
        {
            "model": MODEL,
            "adapter": {"method": "lora", "r": RANK, "alpha": ALPHA, "targets": targets},
            "data": {
                **{split: f"{DATA}/generate/{data}/{split}.jsonl.gz" for split in splits},
                "max_rows": splits,
            },
            "train": {
                "max_steps": steps, "batch_rows": ROWS, "lr": LR, "schedule": "constant", "warmup": 0, "seed": SEED,
                "max_length": LENGTH, "log_every": 1, **(train or {}),
            },
            "output": str(folder / "run"),
        }
    )  # fmt: skip


def fresh_model() -> Any:
    """The base in float32, its weights in memory of their own."""
    from lorakit.models import load_model

    model = load_model(MODEL, dtype="float32", device="cpu")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not pages of a file that come and go
    return model


def ends_of_steps(folder: Path) -> list[float]:
    """Seconds of a run at the end of each of its steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "loss" in line]
