"""Who is next: requests that wait, in an order that gives every tenant, and every adapter of a tenant, its share.

Each has an account of the tokens that were computed for it; who has had the least is next (a virtual token counter as
in Sheng et al. 2024, "Fairness in Serving Large Language Models"). Who was away begins at the level of those who were
not: nothing can be saved up. Who has waited too long goes before all others, so nobody waits for ever.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lorakit.serve.answer import Job

DECODED = 2
"""What a generated token costs, in tokens of a prompt: those are read many at once."""

_MOST_TRIED = 32


@dataclass
class Account:
    """What was computed for a tenant, or for one adapter of a tenant.

    Attributes:
        served: Tokens that were computed.
        owed: Tokens of prompts that were admitted and not yet computed.
        jobs: Requests that wait or run.
        adapters: Of a tenant: the accounts of its adapters.
    """

    served: float = 0.0
    owed: float = 0.0
    jobs: int = 0
    adapters: dict[str, Account] = field(default_factory=dict)

    @property
    def level(self) -> float:
        """What it has had, and will have when all that is admitted is read."""
        return self.served + self.owed

    def account(self, key: str) -> Account:
        """The account inside this one; a new one begins at the level of the least of the others."""
        found = self.adapters.get(key)
        if found is None:
            least = min((other.level for other in self.adapters.values()), default=0.0)
            found = self.adapters[key] = Account(served=least)
        return found


class FairQueue:
    """Requests that wait for room, and the accounts of everybody who has requests here."""

    def __init__(self, aging: float) -> None:
        """Make an empty one.

        Args:
            aging: Seconds after which a request goes before all others.
        """
        self._aging = aging
        self._tenants = Account()
        self._waiting: dict[str, Job] = {}
        self._lines: dict[tuple[int, str, str], deque[Job]] = {}
        self._deadlines: list[tuple[float, int, Job]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._waiting.values()))

    def waiting_of(self, tenant: str | None) -> int:
        """Requests of a tenant that wait."""
        return sum(job.request.tenant == tenant for job in self._waiting.values())

    # ---- coming and going
    def add(self, job: Job) -> None:
        """A request has come."""
        for account in self.accounts(job):
            account.jobs += 1
        self._waiting[job.request.id] = job
        self._lines.setdefault(self._line(job), deque()).append(job)
        if job.request.deadline is not None:
            heapq.heappush(self._deadlines, (job.request.deadline, job.order, job))

    def remove(self, request_id: str) -> Job | None:
        """A request waits no longer; it has to be ended or begun. None when it does not wait here."""
        job = self._waiting.pop(request_id, None)
        if job is not None:
            line = self._lines[self._line(job)]
            line.remove(job)
            if not line:
                del self._lines[self._line(job)]
        return job

    def expired(self, now: float) -> list[Job]:
        """Take out the requests whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            if self._waiting.get(job.request.id) is job:
                self.remove(job.request.id)
                late.append(job)
        return late

    def left(self, job: Job) -> None:
        """A request has ended, wherever it was: its accounts are closed when nobody else uses them."""
        tenant, adapter = self.accounts(job)
        for account in (tenant, adapter):
            account.jobs -= 1
            account.owed -= job.owed
        if not adapter.jobs:
            del tenant.adapters[job.digest or ""]
        if not tenant.jobs:
            del self._tenants.adapters[job.request.tenant or ""]

    # ---- shares
    def accounts(self, job: Job) -> tuple[Account, Account]:
        """Of the tenant, and of the adapter."""
        tenant = self._tenants.account(job.request.tenant or "")
        return tenant, tenant.account(job.digest or "")

    def charge(self, job: Job, tokens: int, *, decoded: bool) -> None:
        """So many tokens are being computed for a request."""
        for account in self.accounts(job):
            account.served += tokens * DECODED if decoded else tokens
            account.owed -= 0 if decoded else tokens
        if not decoded:
            job.owed -= tokens

    def served(self, job: Job) -> tuple[float, float]:
        """What the tenant, and what the adapter has had: who has less is next."""
        tenant, adapter = self.accounts(job)
        return tenant.served, adapter.served

    def admit(self, now: float, place: Callable[[Job], bool]) -> list[Job]:
        """Take out those who are next and for whom there is room.

        Args:
            now: `time.monotonic`.
            place: Tries to make room for a request.
        """
        heads = [(self._rank(line[0], now), line[0].order, line[0]) for line in self._lines.values()]
        heapq.heapify(heads)
        admitted: list[Job] = []
        failed = 0
        while heads and failed < _MOST_TRIED:
            rank, _, job = heapq.heappop(heads)
            current = self._rank(job, now)
            if current > rank:  # somebody of the same tenant was admitted in the meantime
                heapq.heappush(heads, (current, job.order, job))
                continue
            if not place(job):
                failed += 1
                if self._aged(job, now):
                    break  # what is freed from now on is for this one
                continue
            admitted.append(job)
            self.remove(job.request.id)
            job.owed = job.answers[0].unread
            for account in self.accounts(job):
                account.owed += job.owed
            line = self._lines.get(self._line(job))
            if line:
                heapq.heappush(heads, (self._rank(line[0], now), line[0].order, line[0]))
        return admitted

    def _rank(self, job: Job, now: float) -> tuple[float, ...]:
        if self._aged(job, now):
            return (0.0, float(job.order))
        tenant, adapter = self.accounts(job)
        return (1.0, -float(job.request.priority), tenant.level, adapter.level)

    def _aged(self, job: Job, now: float) -> bool:
        return now - job.submitted > self._aging

    def _line(self, job: Job) -> tuple[int, str, str]:
        return -job.request.priority, job.request.tenant or "", job.digest or ""
