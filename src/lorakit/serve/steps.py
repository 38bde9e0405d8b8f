"""Steps: the model runs once for all work, every answer gets its token, and a failure stays with whom it belongs to."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lorakit.errors import InternalServeError, MemoryExhaustedError, ServeError, SlowReaderError
from lorakit.serve.answer import Answer, Job
from lorakit.serve.batch import Packed, Work, pack
from lorakit.serve.sampling import Choice, choose

if TYPE_CHECKING:
    from lorakit.serve.prefix import PrefixCache
    from lorakit.serve.runner import ModelRunner

_log = logging.getLogger("lorakit.serve")
_NO_MEMORY = ("can't allocate memory", "out of memory")  # as torch says it, in a RuntimeError


class StepFacts(NamedTuple):
    """What a step computed: tokens of growing answers, tokens of prompts, different adapters; and its seconds."""

    decoded: int = 0
    prompt: int = 0
    adapters: int = 0
    seconds: float = 0.0


class Steps:
    """Runs steps, and counts.

    Attributes:
        count: Steps so far.
        prompt_tokens: Tokens of prompts that were computed.
        generated_tokens: Tokens that were chosen.
        last: The last step.
    """

    def __init__(self, runner: ModelRunner, prefix: PrefixCache | None) -> None:
        self._runner, self._prefix = runner, prefix
        self.count = self.prompt_tokens = self.generated_tokens = 0
        self.last = StepFacts()

    def run(self, work: Sequence[Work]) -> None:
        """One step for all work. Whoever fails is ended; nobody else notices."""
        began = time.monotonic()
        decoded = sum(item.answer.started for item in work)
        prompt = sum(item.count for item in work if not item.answer.started)
        adapters = len({item.answer.digest for item in work if item.answer.digest is not None})
        for packed, logits in self._forward(work):
            self._advance(packed, logits)
        self.count += 1
        self.prompt_tokens += prompt
        self.last = StepFacts(decoded, prompt, adapters, time.monotonic() - began)

    def _forward(self, work: Sequence[Work]) -> list[tuple[Packed, Tensor]]:
        """Run the model. If that fails, run each half alone: keys and values are written again, so nothing is lost."""
        packed = pack(work, self._runner.arena.keys.device)
        try:
            return [(packed, self._runner.step(packed.batch))]
        except Exception as error:
            if len(work) == 1:
                _fail(work[0].answer.job, error)
                return []
            _log.warning("A step of %d requests failed (%s); each half runs alone.", len(work), error)
            half = len(packed.work) // 2
            return [*self._forward(packed.work[:half]), *self._forward(packed.work[half:])]

    def _advance(self, packed: Packed, logits: Tensor) -> None:
        """Move every answer on: what it has read, and its next token."""
        growing: list[tuple[Answer, int]] = []
        for item, rows in zip(packed.work, packed.rows, strict=True):
            answer = item.answer
            complete = item.complete
            if answer.wants_prompt_logprobs:
                answer.note_prompt(logits[rows], item.count)
            answer.read += item.count
            if not complete:
                continue
            growing.append((answer, rows.stop - 1))
            if not answer.started:
                growing += [(other, rows.stop - 1) for other in self._spread(answer)]
        choices = _choices(logits, growing)
        now = time.monotonic()
        for (answer, _), choice in zip(growing, choices, strict=True):
            if answer.finished:  # with another answer of its request
                continue
            if isinstance(choice, Exception):
                _fail(answer.job, choice)
                continue
            try:
                kept = answer.take(choice, now)
            except Exception as error:
                _fail(answer.job, error)
                continue
            self.generated_tokens += 1
            if not kept:
                answer.job.end(
                    "error", now, SlowReaderError("The answer was not read; the request was aborted.")
                )

    def _spread(self, answer: Answer) -> list[Answer]:
        """A prompt is read: keep its beginning, and give it to the other answers of the request."""
        job = answer.job
        if self._prefix is not None:
            self._prefix.keep(job.request.prompt, job.digest, job.request.tenant, answer.slab)
        others = [other for other in job.answers if other.leader is answer]
        for other in others:
            other.slab.copy_from(answer.slab, answer.read)
            other.read, other.leader = answer.read, None
        return others


def _choices(logits: Tensor, growing: Sequence[tuple[Answer, int]]) -> list[Choice | Exception]:
    """The next token of each answer, all at once; where that fails, one by one, so that it fails for one only."""
    if not growing:
        return []
    try:
        return [*_chosen(logits, growing)]
    except Exception:
        return [_chosen_alone(logits, pair) for pair in growing]


def _chosen(logits: Tensor, growing: Sequence[tuple[Answer, int]]) -> list[Choice]:
    rows = [row for _, row in growing]
    own = logits if rows == list(range(len(logits))) else logits[rows]
    masks = [
        None if answer.matcher is None else answer.matcher.mask().to(logits.device) for answer, _ in growing
    ]
    return choose(own, [answer.chooser for answer, _ in growing], masks)


def _chosen_alone(logits: Tensor, pair: tuple[Answer, int]) -> Choice | Exception:
    try:
        return _chosen(logits, [pair])[0]
    except Exception as error:
        return error


def _fail(job: Job, error: Exception) -> None:
    """End a request with an error that a client may see; the details are for the log."""
    _log.error("Request %s failed.", job.request.id, exc_info=error)
    job.end("error", time.monotonic(), _shown(error))


def _shown(error: Exception) -> Exception:
    if isinstance(error, ServeError):
        return error
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return MemoryExhaustedError("There was not enough memory to go on with the request.")
    return InternalServeError("The request failed inside the engine; the server's log says why.")
