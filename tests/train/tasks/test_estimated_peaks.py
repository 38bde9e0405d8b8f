"""What an estimate says of a step is what that step takes, for each kind of batch that is padded."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lorakit.train import Recipe
from lorakit.train.attaching import attach_all
from lorakit.train.estimating import estimate
from lorakit.train.fused_layers import fused_layers
from lorakit.train.head_loss import separable_head
from lorakit.train.loss import NEXT_TOKEN
from lorakit.train.tasks import task_of
from tests.peak_bytes import peak_bytes
from tests.tiny_chat import save_tiny_chat
from tests.tiny_encoder import WORDS

MakeTask = Callable[..., Recipe]
ROWS = 24


def words(generator: random.Random, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(most // 2, most)))


def rows(kind: str) -> list[dict[str, Any]]:
    """Texts of unlike lengths; what is to be written is shorter than what is read."""
    generator = random.Random(0)
    read, other = ([words(generator, most) for _ in range(ROWS)] for most in (60, 20))
    pairs = list(zip(read, other, strict=True))
    if kind in ("causal-lm", "seq2seq"):
        first, second = ("prompt", "completion") if kind == "causal-lm" else ("source", "target")
        return [{first: a, second: b} for a, b in pairs]
    if kind == "dpo":
        return [{"prompt": a, "chosen": b, "rejected": b[::-1] + "!"} for a, b in pairs]
    if kind == "embedding":
        return [{"text": a, "second_text": b} for a, b in pairs]
    return [{"text": a, "label": ("x", "y")[i % 2]} for i, (a, _) in enumerate(pairs)]


def in_earnest(recipe: Recipe) -> int:
    """Bytes of a real forward and backward pass of the run's only batch."""
    task = task_of(recipe)
    resolved = task.resolve()
    tokenizer = task.tokenizer(resolved)
    read = task.rows(tokenizer, "train").rows
    model = task.load(resolved)
    task.accept(model)
    assert tokenizer is not None
    collator, _ = task.collator(model, tokenizer)
    learnt = task.prepared(model, read, collator)
    (batch,) = task.batches(learnt, collator.padded)
    attach_all(task, model, None, learnt, [batch], collator)
    model.train()
    if task.objective is NEXT_TOKEN:
        separable_head(model)
    with fused_layers(model, packs=not collator.padded) if recipe.train.fused else nullcontext():
        tensors = collator([learnt[i] for i in batch])
        step = lambda: task.objective.summed(model, model, tensors).backward()  # noqa: E731
        step()  # what is made once and stays, such as tables of rotary positions
        model.zero_grad()
        return peak_bytes(step)


CASES = {
    "causal-lm": {"batching": "padded"},
    "causal-lm, not fused": {"batching": "padded", "fused": False},
    "causal-lm, packed": {},
    "dpo": {"batching": "padded"},
    "seq2seq, t5": {},
    "seq2seq, bart": {"max_length": 64, "overlong": "truncate"},
    "classification": {},
    "embedding": {},
}


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_what_a_step_takes(
    case: str, make_task: MakeTask, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind, _, which = case.partition(", ")
    if kind in ("causal-lm", "dpo"):
        folder = save_tiny_chat(tmp_path / "chat", hidden_size=96, intermediate_size=192)
    else:
        folder = request.getfixturevalue(f"{which or 'encoder'}_folder")
    train = {"batch_rows": ROWS, "max_steps": 1, "max_length": 1024, **CASES[case]}
    recipe = make_task(kind, folder, rows(kind), train=train)
    training = estimate(recipe).plan.training
    assert training is not None
    said, took = training.activations + training.gradients, in_earnest(recipe)
    assert said == pytest.approx(took, rel=0.02)
