"""What is asked of an engine: random prompts, lengths, adapters, arrivals; and what is told of the answers."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Popularity = Literal["uniform", "power", "distinct", "skewed", "identical"]
PROMPT, ANSWER, TOKENS = (8, 128), (8, 64), (100, 49_000)


@dataclass
class Asked:
    """One request; times are seconds of `time.perf_counter`.

    Attributes:
        prompt: Random tokens.
        tokens: How many it wants; the end-of-text token is ignored.
        adapter: Its number; None is the base.
        arrival: Seconds after the start, where requests come by themselves.
        submitted: When it was sent.
        first: When its first token came.
        done: When its last token came.
        answer: Its tokens.
    """

    prompt: list[int]
    tokens: int
    adapter: int | None
    arrival: float = 0.0
    submitted: float = 0.0
    first: float | None = None
    done: float | None = None
    answer: list[int] = field(default_factory=list)

    def came(self, token: int, now: float) -> bool:
        """Note a token; True with the last one."""
        if self.first is None:
            self.first = now
        self.answer.append(int(token))
        if len(self.answer) == self.tokens:
            self.done = now
        return self.done is not None


class Coming:
    """The requests as a client has them who drives an engine step by step.

    Args:
        asked: All, in order.
        together: How many are under way at a time; None: each comes at its arrival, counted from now.
    """

    def __init__(self, asked: Sequence[Asked], together: int | None) -> None:
        self._left = deque(asked)
        self._together, self._began = together, time.perf_counter()

    def __bool__(self) -> bool:
        return bool(self._left)

    def due(self, running: int) -> list[Asked]:
        """Those that are to be sent now, while ``running`` others are under way."""
        now = time.perf_counter()
        sent: list[Asked] = []
        while self._left and (
            self._began + self._left[0].arrival <= now
            if self._together is None
            else running + len(sent) < self._together
        ):
            one = self._left.popleft()
            # Who had to wait until somebody looked has waited for the engine.
            one.submitted = now if self._together is not None else self._began + one.arrival
            sent.append(one)
        return sent

    def wait(self) -> None:
        """Sleep until the next one comes."""
        if self._left and self._together is None:
            time.sleep(max(0.0, self._began + self._left[0].arrival - time.perf_counter()))


def make_load(
    adapters: int,
    popularity: Popularity = "uniform",
    requests: int = 64,
    *,
    seed: int = 42,
    alpha: float = 0.3,
    rate: float | None = None,
    cv: float = 1.0,
    vocabulary: int | None = None,
) -> list[Asked]:
    """Requests; prompts and lengths depend on the seed alone, so that loads differ in nothing but their adapters.

    Args:
        adapters: How many there are; 0 asks the base.
        popularity: ``uniform``; ``power``: S-LoRA's, number ``x ** (1 / alpha) * n``; Punica's ``distinct`` (each its
            own), ``skewed`` (each half as many again as the next) and ``identical``.
        requests: How many.
        seed: Of everything.
        alpha: Of ``power``.
        rate: Requests a second, in Gamma-distributed steps; None: the next is sent when one has ended.
        cv: Their coefficient of variation.
        vocabulary: Tokens are below it.
    """
    lengths, numbers, times = (random.Random(seed + i) for i in range(3))
    most = TOKENS[1] if vocabulary is None else min(TOKENS[1], vocabulary)
    made, at = [], 0.0
    for i in range(requests):
        prompt_length, answer_length = lengths.randrange(*PROMPT), lengths.randrange(*ANSWER)
        prompt = [lengths.randrange(TOKENS[0], most) for _ in range(prompt_length)]
        if rate is not None:
            at += times.gammavariate(1 / cv**2, cv**2 / rate)
        which = None if adapters == 0 else _number(popularity, adapters, i, requests, numbers, alpha)
        made.append(Asked(prompt, answer_length, which, at))
    return made


def _number(
    popularity: Popularity, adapters: int, i: int, requests: int, draw: random.Random, alpha: float
) -> int:
    if popularity == "uniform":
        return draw.randrange(adapters)
    if popularity == "power":
        return min(adapters - 1, int(draw.random() ** (1 / alpha) * adapters))
    if popularity == "distinct":
        return i % adapters
    if popularity == "identical":
        return 0
    weights = [1.5**-k for k in range(adapters)]
    return draw.choices(range(adapters), weights)[0]


def facts(asked: Sequence[Asked], began: float, *, all_answered: bool = True) -> dict[str, Any]:
    """What one run was like: tokens a second, seconds to the first token and per token.

    Args:
        asked: The requests, with their answers.
        began: When the first could have been sent.
        all_answered: Raise an error if one has no answer; else they are counted, and are in no other number but
            ``within_six_seconds``, where they are late.
    """
    answered = [(one, one.first, one.done) for one in asked if one.first is not None and one.done is not None]
    missing = len(asked) - len(answered)
    if missing and (all_answered or not answered):
        raise RuntimeError(f"{missing} of {len(asked)} requests were not answered")
    wall = max(done for _, _, done in answered) - began
    waits = sorted(first - one.submitted for one, first, _ in answered)
    paces = sorted((done - first) / (one.tokens - 1) for one, first, done in answered if one.tokens > 1)
    tokens = sum(one.tokens for one, _, _ in answered)
    answers = json.dumps([one.answer for one in asked])
    return {
        "requests": len(asked),
        "unanswered": missing,
        "adapters_used": len({one.adapter for one in asked if one.adapter is not None}),
        "prompt_tokens": sum(len(one.prompt) for one in asked),
        "tokens": tokens,
        "seconds": wall,
        "tokens_per_second": tokens / wall,
        "requests_per_second": len(answered) / wall,
        "first_token_p50": _share(waits, 0.5),
        "first_token_p99": _share(waits, 0.99),
        "per_token_p50": _share(paces, 0.5),
        "within_six_seconds": sum(wait < 6 for wait in waits) / len(asked),
        "answers": hashlib.sha256(answers.encode()).hexdigest()[:16],
    }


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
