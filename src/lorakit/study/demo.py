"""The main job on a real model: what an adapter gains, what it costs, and that nothing is lost on the way.

SmolLM2-135M-Instruct learns to write SQL for tables it has never seen. Its answers to held-out questions are run on a
real SQLite database before and after; then the adapter is merged, unmerged, saved, and read again by a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.attach import merge, unmerge, use
from lorakit.errors import LorakitError
from lorakit.models import load_model, load_tokenizer
from lorakit.tasks import text_to_sql
from lorakit.train import Answer, Progress, Recipe, Renderer, Silent, evaluate, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 512
QUESTIONS = 100
_RELOADED = 12  # questions that the fresh process answers again


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        model: The base model.
        examples: Questions trained on.
        questions: Held-out questions scored.
        accuracy_before: Share that the base model answers right, by execution.
        accuracy_after: Share that the adapted model answers right.
        trainable: Parameters of the adapter.
        base_parameters: Parameters of the base.
        adapter_bytes: Size of the adapter's folder.
        merge_difference: Largest difference between a logit of the merged and of the unmerged model.
        largest_logit: The largest logit there, to see that difference against.
        unmerged_exactly: Whether the base weights came back bit for bit.
        reloaded_equal: How many of the answers of a fresh process equal those given here.
        reloaded: How many it gave.
        train_seconds: Training alone.
        tokens_per_second: Tokens read in a second of training.
        seconds: Everything.
        adapter: The saved adapter.
        recipe: A recipe that repeats the training.
        plot: The loss curve.
        samples: Question, base answer, adapted answer, and the right one.
    """

    model: str
    examples: int
    questions: int
    accuracy_before: float
    accuracy_after: float
    trainable: int
    base_parameters: int
    adapter_bytes: int
    merge_difference: float
    largest_logit: float
    unmerged_exactly: bool
    reloaded_equal: int
    reloaded: int
    train_seconds: float
    tokens_per_second: float
    seconds: float
    adapter: str
    recipe: str
    plot: str | None
    samples: tuple[tuple[str, str, str, str], ...]

    def rows(self) -> list[tuple[str, str]]:
        """The table that the demo prints: what, and how much."""
        share = 100 * self.trainable / self.base_parameters
        return [
            ("trainable parameters", f"{self.trainable:,} of {self.base_parameters:,} ({share:.2f} %)"),
            ("adapter on disk", f"{self.adapter_bytes / 2**20:.1f} MiB"),
            (
                "training",
                f"{self.train_seconds:.0f} s for {self.examples} questions, {self.tokens_per_second:,.0f} tokens/s",
            ),
            (
                "right answers before",
                f"{100 * self.accuracy_before:.0f} % of {self.questions} held-out questions",
            ),
            ("right answers after", f"{100 * self.accuracy_after:.0f} %"),
            (
                "largest difference merged/unmerged",
                f"{self.merge_difference:.1e} (logits up to {self.largest_logit:.0f})",
            ),
            ("base weights after unmerge", "the same, bit for bit" if self.unmerged_exactly else "CHANGED"),
            ("reloaded in a fresh process", f"{self.reloaded_equal} of {self.reloaded} answers the same"),
            ("whole demo", f"{self.seconds:.0f} s"),
        ]

    @property
    def sound(self) -> bool:
        """Whether everything that must hold held."""
        return (
            self.accuracy_after > self.accuracy_before
            and self.merge_difference < 1e-3 * max(1.0, self.largest_logit)
            and self.unmerged_exactly
            and self.reloaded_equal == self.reloaded
        )


def run(
    out: str | Path,
    *,
    model: str = "smollm2",
    examples: int = EXAMPLES,
    questions: int = QUESTIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo; about four minutes on two cores with the default sizes.

    Args:
        out: Folder for the adapter, the recipe, the loss curve and ``result.json``; replaced if it holds an older demo.
        model: A built-in, folder or hub id of a decoder with a chat template.
        examples: Questions to train on.
        questions: Held-out questions to score, about tables that training has not seen.
        seed: Of the questions, the adapter's start and the order.
        progress: Whom to tell; by default nobody.

    Raises:
        ModelError: The model cannot be fetched or read.
        LorakitError: The fresh process could not load the adapter.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = _write_recipe(folder, model, examples, questions, seed)
    recipe = Recipe.from_file(recipe_file)
    progress.say(f"1/5  loading {model} (fetched and converted once if it is not there yet)")
    base = load_model(model, dtype="float32")
    tokenizer = load_tokenizer(model)
    progress.say(f"2/5  the base model answers {questions} questions about tables that training will not see")
    before = evaluate(recipe, model=base, tokenizer=tokenizer, progress=progress, title="base model")
    progress.say(f"     {_percent(before.scores)} right")
    progress.say(f"3/5  training on {examples} questions about other tables")
    trained = train(recipe, model=base, tokenizer=tokenizer, overwrite=True, progress=progress)
    progress.say("4/5  the adapted model answers the same questions")
    after = evaluate(recipe, model=base, tokenizer=tokenizer, progress=progress, title="adapted model")
    progress.say(f"     {_percent(after.scores)} right")
    progress.say("5/5  merging, unmerging, and reading the saved adapter in a fresh process")
    difference, largest, exact = _merge_and_back(
        base, tokenizer, [a.prompt for a in after.answers[:8]], trained.name
    )
    few = min(_RELOADED, questions)
    here = evaluate(
        recipe, model=base, tokenizer=tokenizer, limit=few
    ).answers  # in the batches of the fresh process
    again = _answers_of_a_fresh_process(recipe_file, trained.adapter, few)
    equal = sum(mine.answer == theirs for mine, theirs in zip(here, again, strict=True))
    result = DemoResult(
        model=model,
        examples=examples,
        questions=questions,
        accuracy_before=before.scores["execution_accuracy"],
        accuracy_after=after.scores["execution_accuracy"],
        trainable=trained.report.trainable,
        base_parameters=trained.report.base_parameters,
        adapter_bytes=sum(file.stat().st_size for file in trained.adapter.iterdir()),
        merge_difference=difference,
        largest_logit=largest,
        unmerged_exactly=exact,
        reloaded_equal=equal,
        reloaded=len(again),
        train_seconds=trained.seconds,
        tokens_per_second=trained.tokens_per_second,
        seconds=time.perf_counter() - began,
        adapter=str(trained.adapter),
        recipe=str(recipe_file),
        plot=None if trained.plot is None else str(trained.plot),
        samples=_samples(before.answers, after.answers),
    )
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def _write_recipe(folder: Path, model: str, examples: int, questions: int, seed: int) -> Path:
    text = f"""\
# What `lorakit demo` trains. Again: lorakit train {folder}/recipe.yaml --overwrite
model: {{name: {json.dumps(model)}, dtype: float32}}
adapter:
  method: lora
  name: sql
  r: 16
  alpha: 32
  targets: all-linear
data:
  builtin: text_to_sql
  train: {examples}
  test: {questions}
  seed: {seed}
train:
  epochs: 1
  batch_rows: 8
  lr: 2e-3
  schedule: linear
  warmup: 0.05
  max_length: 256
  max_seconds: 180  # a slow machine stops here, with what it has learnt
  seed: {seed}
  log_every: 5
generate:
  max_new_tokens: 48
  batch_rows: 25
output: {json.dumps(str(folder))}
"""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _merge_and_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], name: str
) -> tuple[float, float, bool]:
    """The largest logit difference that merging makes, the largest logit, and whether unmerging restores every bit."""
    renderer = Renderer(tokenizer)
    prompts = [torch.tensor([renderer.prompt([{"role": "user", "content": text}])]) for text in questions]
    base = {path: p.detach().clone() for path, p in model.named_parameters() if ".lorakit." not in path}
    with torch.no_grad(), use(model, name):
        unmerged = [model(input_ids=ids.to(model.device)).logits for ids in prompts]
    merge(model, name)
    with torch.no_grad():
        merged = [model(input_ids=ids.to(model.device)).logits for ids in prompts]
    unmerge(model)
    exact = all(torch.equal(p, base[path]) for path, p in model.named_parameters() if ".lorakit." not in path)
    difference = max((a - b).abs().max().item() for a, b in zip(merged, unmerged, strict=True))
    return difference, max(logits.abs().max().item() for logits in unmerged), exact


def _answers_of_a_fresh_process(recipe: Path, adapter: Path, count: int) -> list[str]:
    """Load model and adapter anew in another interpreter, and answer the first questions there."""
    command = [sys.executable, "-m", "lorakit.study.reload", str(recipe), str(adapter), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LorakitError(f"A fresh process could not use the saved adapter:\n{done.stderr.strip()[-2000:]}")
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _samples(
    before: Sequence[Answer], after: Sequence[Answer], most: int = 4
) -> tuple[tuple[str, str, str, str], ...]:
    """A few questions with both answers: those that were learnt first, then whatever comes."""
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: (not pair[1].correct, bool(pair[0].correct)))
    return tuple(
        (_question(b.prompt), _one_line(b.answer), text_to_sql.extract_sql(a.answer), a.references[0])
        for b, a in pairs[:most]
    )


def _question(prompt: str) -> str:
    return prompt.rsplit("Question: ", 1)[-1]


def _one_line(text: str, most: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _percent(scores: dict[str, Any]) -> str:
    return f"{100 * scores['execution_accuracy']:.0f} %"
