"""Which measurement on the valid split was the best one, and when waiting for a better one should end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError, listing, near_matches
from lorakit.train.recipe import TrainSection


@dataclass
class Best:
    """The best measurement so far.

    Attributes:
        metric: What is compared, such as ``"valid_loss"``.
        patience: After how many measurements that were no better the run stops; None for never.
        min_improvement: By how much one must be better to count for ``patience``.
        value: The best value; None before the first measurement.
        step: When it was measured.
        reference: What the next measurement must beat by ``min_improvement``.
        waited: Measurements in a row that did not.
    """

    metric: str
    patience: int | None = None
    min_improvement: float = 0.0
    value: float | None = None
    step: int = 0
    reference: float | None = None
    waited: int = 0

    def seen(self, step: int, values: Mapping[str, float]) -> bool:
        """Take note of a measurement; returns whether it is the best one. A NaN never is."""
        value = values[self.metric]
        if self._is_better(value, self.reference, self.min_improvement):
            self.reference, self.waited = value, 0
        else:
            self.waited += 1
        if not self._is_better(value, self.value, 0.0):
            return False
        self.value, self.step = value, step
        return True

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def plain(self) -> dict[str, Any]:
        """What was best, as JSON can hold it."""
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "value": self.value,
            "step": self.step,
            "reference": self.reference,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.value, self.step = state["value"], state["step"]
        self.reference, self.waited = state["reference"], state["waited"]

    def _is_better(self, value: float, than: float | None, by: float) -> bool:
        if math.isnan(value):
            return False
        if than is None:
            return True
        return value < than - by if smaller_is_better(self.metric) else value > than + by


def smaller_is_better(metric: str) -> bool:
    """Whether a metric is a loss, perhaps that of one of several adapters (``valid_loss_sql``); others are scores."""
    return metric.startswith("valid_loss") or metric.endswith(("loss", "perplexity"))


def best_of(settings: TrainSection, measures: Sequence[str], *, has_valid: bool) -> Best | None:
    """What a recipe asks to be watched; None for nothing.

    Args:
        settings: The recipe's.
        measures: What the task measures on the valid split.
        has_valid: Whether there is one.

    Raises:
        ConfigError: The task does not measure what the recipe names.
    """
    metric = settings.keep_best
    if metric == "none" or not has_valid or (metric == "auto" and settings.eval_every is None):
        return None
    if metric == "auto":
        metric = "valid_loss" if "valid_loss" in measures else measures[0]
    if metric not in measures:
        raise ConfigError(
            f"train.keep_best is {metric!r}, which this task does not measure.{near_matches(metric, measures)} It "
            f"measures {listing(measures)}."
        )
    return Best(metric, settings.patience, settings.min_improvement)
