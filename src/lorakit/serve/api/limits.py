"""How much is let in: requests in a minute and at a time for each tenant, requests and bytes for all together.

What is over a tenant's limit is 429, what is over the server's is 503, a body that is too large 413; each before
anything of the request is parsed or tokenised. Waiting costs little, so the limits are on what is held at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorakit.errors import ConfigError, OverloadedError, RateLimitError, RequestTooLargeError
from lorakit.serve.api.auth import Tenant


@dataclass(frozen=True)
class Limits:
    """What a server lets in.

    Attributes:
        in_flight: Requests for answers at a time, waiting or running, of all tenants.
        tenant_in_flight: The same of one tenant that has no limit of its own.
        requests_per_minute: Of one tenant that has no limit of its own; None for any number.
        body_bytes: The largest body of a request.
        held_bytes: Bytes of all bodies held at a time.
        body_seconds: The longest that a client may take to send a body.
    """

    in_flight: int = 512
    tenant_in_flight: int = 256
    requests_per_minute: float | None = None
    body_bytes: int = 4 * 1024**2
    held_bytes: int = 64 * 1024**2
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("in_flight", "tenant_in_flight", "body_bytes", "held_bytes", "body_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"The limit {name} must be above 0; got {getattr(self, name)!r}.")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ConfigError(f"requests_per_minute must be above 0; got {self.requests_per_minute!r}.")


@dataclass
class _Account:
    """What one tenant has in hand: a bucket that fills with its requests per minute."""

    tokens: float
    filled: float
    in_flight: int = 0


@dataclass
class Admission:
    """Counts what is in; one for a server."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    in_flight: int = 0
    held_bytes: int = 0
    _accounts: dict[str | None, _Account] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def request(self, tenant: Tenant) -> Iterator[None]:
        """Let a request for an answer in, until its answer is over.

        Raises:
            RateLimitError: The tenant has had its share.
            OverloadedError: The server is full.
        """
        with self._lock:
            account = self._enter(tenant)
        try:
            yield
        finally:
            with self._lock:
                account.in_flight -= 1
                self.in_flight -= 1

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Hold a body while its request is answered; call what it gives with the bytes of each piece.

        Raises:
            RequestTooLargeError: From that call, when there are too many for one request.
            OverloadedError: From that call, when there are too many in all.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            self.check_length(held + size)
            with self._lock:
                if self.held_bytes + size > self.limits.held_bytes:
                    raise OverloadedError(
                        "The server holds as much of other requests as it can; try again soon.", retry_after=1
                    )
                self.held_bytes += size
            held += size

        try:
            yield hold
        finally:
            with self._lock:
                self.held_bytes -= held

    def check_length(self, size: int) -> None:
        """Refuse a body by its size, or its announced size.

        Raises:
            RequestTooLargeError: It is too large.
        """
        if size > self.limits.body_bytes:
            raise RequestTooLargeError(
                f"The body of a request may have {self.limits.body_bytes} bytes; this one has {size} or more."
            )

    def _enter(self, tenant: Tenant) -> _Account:
        per_minute = tenant.requests_per_minute or self.limits.requests_per_minute
        most = tenant.in_flight or self.limits.tenant_in_flight
        now = self.clock()
        capacity = max(1.0, per_minute or 1.0)
        account = self._accounts.setdefault(tenant.name, _Account(capacity, now))
        if self.in_flight >= self.limits.in_flight:
            raise OverloadedError(
                f"The server has {self.in_flight} requests in hand, as many as it takes; try again soon.",
                retry_after=1,
            )
        if account.in_flight >= most:
            raise RateLimitError(
                f"There are {account.in_flight} requests of yours in hand, as many as you may have; wait for one.",
                retry_after=1,
            )
        if per_minute is not None:
            account.tokens = min(capacity, account.tokens + (now - account.filled) * per_minute / 60)
            account.filled = now
            if account.tokens < 1:
                wait = (1 - account.tokens) * 60 / per_minute
                raise RateLimitError(
                    f"You have had your {per_minute:g} requests per minute; the next is free in {wait:.1f} seconds.",
                    retry_after=max(1, math.ceil(wait)),
                )
            account.tokens -= 1
        account.in_flight += 1
        self.in_flight += 1
        return account
