"""What the next step computes: every answer that grows, and with the rest of the budget pieces of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.errors import ConfigError
from lorakit.serve.answer import Answer, Job
from lorakit.serve.batch import Work
from lorakit.serve.fairness import FairQueue


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine does at once.

    Attributes:
        step_tokens: Tokens of a step. More read prompts faster, and make those whose answers grow wait longer.
        running: Answers that grow or read their prompts at a time.
        waiting: Requests that may wait; one more is refused.
        waiting_per_tenant: The same for one tenant; None is no limit of its own.
        adapters_per_step: Different adapters in one step, which take turns; None is no limit.
        aging: Seconds of waiting after which a request goes before all others.
        prefix_cache_bytes: Memory for the beginnings of prompts; 0 keeps none.
        unread_events: Events that a reader may be behind before its request is aborted.

    Raises:
        ConfigError: A value makes no sense.
    """

    step_tokens: int = 128
    running: int = 32
    waiting: int = 1024
    waiting_per_tenant: int | None = None
    adapters_per_step: int | None = None
    aging: float = 5.0
    prefix_cache_bytes: int = 0
    unread_events: int = 4096

    def __post_init__(self) -> None:
        least = {"step_tokens": 2, "running": 1, "waiting": 0, "prefix_cache_bytes": 0, "unread_events": 16}
        if self.adapters_per_step is not None:
            least["adapters_per_step"] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}; got {getattr(self, name)}.")
        if self.aging <= 0:
            raise ConfigError(f"aging must be more than 0 seconds; got {self.aging}.")
        if self.running >= self.step_tokens:
            raise ConfigError(
                f"{self.running} answers may run at a time, but a step has {self.step_tokens} tokens: when all of them "
                "grow, no prompt could be read. Raise step_tokens or lower running."
            )


class Scheduler:
    """Admits requests, and plans steps."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.queue = FairQueue(limits.aging)
        self.running: list[Answer] = []
        self._turns: dict[str, int] = {}
        self._steps = 0

    def admit(self, now: float, place: Callable[[Job], bool]) -> list[Job]:
        """Begin the requests that are next, as far as there is room.

        Args:
            now: `time.monotonic`.
            place: Reserves what a request needs and makes its answers; False when there is no room.
        """
        left = self.limits.running - len(self.running)

        def fits(job: Job) -> bool:
            nonlocal left
            if job.request.n > left or not place(job):
                return False
            left -= job.request.n
            return True

        admitted = self.queue.admit(now, fits) if left > 0 and len(self.queue) else []
        for job in admitted:
            job.admitted = now
            self.running += job.answers
        return admitted

    def plan(self) -> list[Work]:
        """The next step: one token of each answer that grows, then pieces of prompts while the budget lasts."""
        ready = [answer for answer in self.running if answer.leader is None]
        ready = self._taking_turns(ready)
        work: list[Work] = []
        for answer in ready:
            if answer.started:
                work.append(Work(answer, 1))
                self.queue.charge(answer.job, 1, decoded=True)
        left = self.limits.step_tokens - len(work)
        prompts = [answer for answer in ready if not answer.started]
        prompts.sort(key=lambda a: (-a.job.request.priority, *self.queue.served(a.job), a.job.order))
        for answer in prompts:
            count = min(left, answer.unread)
            if count == 0:
                break
            work.append(Work(answer, count))
            self.queue.charge(answer.job, count, decoded=False)
            left -= count
        return work

    def drop_finished(self) -> None:
        """Forget the answers that have ended."""
        self.running = [answer for answer in self.running if not answer.finished]

    def _taking_turns(self, ready: Sequence[Answer]) -> list[Answer]:
        """The answers of the base and of as many adapters as a step may have: those that waited longest for a turn."""
        most = self.limits.adapters_per_step
        digests = list(dict.fromkeys(answer.digest for answer in ready if answer.digest is not None))
        if most is None or len(digests) <= most:
            return list(ready)
        self._steps += 1
        self._turns = {digest: self._turns.get(digest, 0) for digest in digests}
        chosen = set(sorted(digests, key=self._turns.__getitem__)[:most])
        self._turns.update(dict.fromkeys(chosen, self._steps))
        return [answer for answer in ready if answer.digest is None or answer.digest in chosen]
