"""Whether a recipe would run: its data, template, lengths and adapter, without training and without weights.

The model is built on the meta device, which has layers and no numbers, and one step of the largest batch is rehearsed
there. What needs the weights themselves (whether the stop token was ever trained) is told when training starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import LorakitError
from lorakit.models.conversation import stop_id
from lorakit.train.recipe import Recipe
from lorakit.train.run_files import read_run
from lorakit.train.split import Split
from lorakit.train.task import Task
from lorakit.train.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.plan import Architecture

State = Literal["ok", "warning", "wrong", "skipped"]
_CHAT_TASKS = ("causal-lm", "dpo")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        state: ``wrong`` is what training would refuse; ``skipped`` is what could not be looked at.
        text: What was found.
    """

    subject: str
    state: State
    text: str


@dataclass
class CheckReport:
    """All that was looked at.

    Attributes:
        findings: In the order of a run.
    """

    findings: list[Finding] = field(default_factory=list)

    def add(self, subject: str, state: State, text: str) -> None:
        """Note one thing."""
        self.findings.append(Finding(subject, state, text))

    def tried(self, subject: str, step: Callable[[], str]) -> bool:
        """Note what a step says of itself, or the error that it ends with; returns whether it succeeded."""
        try:
            self.add(subject, "ok", step())
        except (LorakitError, OSError) as error:
            self.add(subject, "wrong", str(error))
            return False
        return True

    def count(self, state: State) -> int:
        """How many findings are of a kind."""
        return sum(finding.state == state for finding in self.findings)

    @property
    def passed(self) -> bool:
        """Whether training would start."""
        return not self.count("wrong")


def check(recipe: Recipe) -> CheckReport:
    """Look at everything that can be looked at before a run, and go on after the first mistake.

    Args:
        recipe: From `Recipe.from_file`, which has checked its keys and values already.

    Returns:
        What was found; `CheckReport.passed` says whether `train` would start.
    """
    report = CheckReport()
    task = task_of(recipe)
    _check_output(recipe, report)
    tokenizer = _check_tokenizer(task, report)
    rows: dict[Split, Any] = {}
    if tokenizer is not None or report.passed:
        for split in ("train", "valid"):
            if task.has_split(split):
                _check_rows(task, tokenizer, split, rows, report)
        if "train" in rows:
            _check_repeats(rows, report)
    else:
        report.add("data", "skipped", "without the tokenizer no row can be rendered")
    if not task.has_split("train"):
        report.add("train split", "wrong", "The recipe names nothing to train on: set data.train.")
    if task.has_split("test"):
        report.tried("test split", lambda: f"{len(task.examples('test', None)):,} examples to score")
    _check_model(task, rows.get("train"), report)
    return report


def _check_output(recipe: Recipe, report: CheckReport) -> None:
    folder = recipe.output
    if folder.exists() and not folder.is_dir():
        report.add("output", "wrong", f"{folder} is a file; name a folder.")
    elif folder.is_dir() and read_run(folder) is not None:
        report.add(
            "output", "warning", f"{folder} holds a run already; lorakit train will ask for --overwrite."
        )
    else:
        report.add("output", "ok", str(folder))


def _check_tokenizer(task: Task, report: CheckReport) -> PreTrainedTokenizerBase | None:
    found: list[Any] = [None]

    def load() -> str:
        tokenizer = found[0] = task.tokenizer(task.resolve())
        if tokenizer is None:
            return "the task needs none"
        return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"

    if not report.tried("tokenizer", load) or found[0] is None:
        return None
    if task.recipe.task in _CHAT_TASKS:
        report.tried("chat template", lambda: _template(found[0]))
    return found[0]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    stop = tokenizer.convert_ids_to_tokens(stop_id(tokenizer))
    chat = getattr(tokenizer, "chat_template", None)
    words = "only appends, as it must" if chat else "none: rows are rendered plainly, a line a turn"
    return f"{words}; answers end in {stop!r}"


def _check_rows(
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    split: Split,
    rows: dict[Split, Any],
    report: CheckReport,
) -> None:
    def read() -> str:
        rows[split] = task.rows(tokenizer, split)
        return str(rows[split])

    if not report.tried(f"{split} split", read):
        return
    found = rows[split]
    gone = found.truncated + found.dropped
    if gone:
        what = "cut" if found.truncated else "left out"
        share = 100 * gone / (len(found.rows) + found.dropped)
        report.add(
            f"{split} lengths",
            "warning",
            f"{gone:,} rows ({share:.1f} %) are {what}: the longest has {found.longest:,} tokens, train.max_length is "
            f"{task.recipe.train.max_length:,}.",
        )


def _check_repeats(rows: dict[Split, Any], report: CheckReport) -> None:
    """Rows that stand twice are learnt twice; rows of the valid split that are learnt too say nothing there."""
    train = Counter(map(_key, rows["train"].rows))
    repeated = sum(train.values()) - len(train)
    if repeated:
        report.add("repeats", "warning", f"{repeated:,} rows of the train split stand there more than once.")
    if "valid" in rows:
        known = [row.id for row in rows["valid"].rows if _key(row) in train]
        if known:
            report.add(
                "leaks",
                "warning",
                f"{len(known):,} of {len(rows['valid'].rows):,} rows of the valid split are trained on too, the first "
                f"of them {known[0]}.",
            )


def _key(row: Any) -> str:
    return repr(row.content)


def _check_model(task: Task, rows: Any, report: CheckReport) -> None:
    """The adapter on the real architecture, and one step of the largest batch, on the meta device."""
    from lorakit.train import estimating

    recipe = task.recipe
    base: list[Architecture] = []

    def build() -> str:
        base.append(estimating.architecture_of(task, estimating.config_of(recipe)))
        return f"{type(base[0].model).__name__}, {sum(p.numel() for p in base[0].model.parameters()):,} parameters"

    try:
        report.add("model", "ok", build())
    except (LorakitError, OSError) as error:
        report.add("model", "skipped", str(error).splitlines()[0])
        return
    if rows is not None:
        report.tried("lengths", lambda: _lengths(task, base[0], rows.rows))
    report.tried("adapter", lambda: _adapter(task, base[0], rows))


def _lengths(task: Task, base: Architecture, rows: Sequence[Any]) -> str:
    task.check_length(base.model, rows)
    most = base.longest
    return f"every row fits the model's {most:,} positions" if most else "the model names no greatest length"


def _adapter(task: Task, base: Architecture, rows: Any) -> str:
    from lorakit.train import estimating
    from lorakit.train.task_plan import task_plan

    shape = estimating.guessed_shape(task) if rows is None else estimating.shape_of(task, rows.rows)
    planned = task_plan(task, base, shape)
    counts = planned.counts
    words = f"{len(counts.sites)} targets, {counts.trainable:,} parameters to train"
    if planned.training is None:
        return words
    return (
        f"{words}; one step of {shape.rows} rows with {shape.size:,} tokens ran on the meta device and "
        f"needs about {planned.training.total / 1e9:.1f} GB"
    )
