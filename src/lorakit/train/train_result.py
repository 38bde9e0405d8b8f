"""What a run did, as `lorakit.train.train` returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.attach import AttachReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        folder: The output folder.
        adapters: Name on ``model`` to the folder of each trained adapter; most runs have one.
        steps: Optimizer steps done, those before a resume included.
        seconds: Spent training, without loading and without scoring.
        tokens: Tokens read; where nothing is text, images.
        reads: Which of the two: ``"token"`` or ``"image"``.
        learnt_tokens: Of these, tokens that were learnt; for a classifier, rows.
        losses: Mean loss over what each step taught, in nats; with several adapters the mean of theirs.
        losses_of: With several adapters each one's own, by name.
        valid_loss: The last one measured, if the recipe names a valid split.
        stopped_by: ``"max_seconds"``, ``"patience"`` or ``"interrupt"`` when the run ended before its last step.
        best: The best measurement on the valid split (its ``metric``, ``value`` and ``step``), where that was watched;
            the adapters of that step are in ``best/``.
        silent: Targets that had no gradient in the first steps.
        reports: What was attached, by the adapter's name.
        plot: The picture of the loss, where matplotlib is installed.
        model: The model with the trained adapter on it, in ``eval()``.
        tokenizer: Its tokenizer.
    """

    folder: Path
    adapters: Mapping[str, Path]
    steps: int
    seconds: float
    tokens: int
    reads: str
    learnt_tokens: int
    losses: tuple[float, ...]
    losses_of: Mapping[str, Sequence[float]]
    valid_loss: float | None
    stopped_by: str | None
    best: Mapping[str, Any] | None
    silent: tuple[str, ...]
    reports: Mapping[str, AttachReport]
    plot: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The adapter's name on ``model``; the first one's where there are several."""
        return next(iter(self.adapters))

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter; the first one's where there are several."""
        return self.adapters[self.name]

    @property
    def report(self) -> AttachReport:
        """What was attached; of the first adapter where there are several."""
        return self.reports[self.name]

    @property
    def tokens_per_second(self) -> float:
        """Tokens, or images, read in a second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """How the run ended, as JSON can hold it."""
        return {
            "how": self.stopped_by or "finished",
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            f"{self.reads}s": self.tokens,
            "learnt_tokens": self.learnt_tokens,
            f"{self.reads}s_per_second": round(self.tokens_per_second, 1),
            "last_loss": self.losses[-1],
            "valid_loss": self.valid_loss,
            "best": self.best,
            **({"without_gradient": list(self.silent)} if self.silent else {}),
        }
