"""The replicas together: they are watched, started again when they die, and told what the others were told."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from lorakit.serve.api.record import log
from lorakit.serve.router.catalog import Catalog
from lorakit.serve.router.placement import preference
from lorakit.serve.router.replica import Replica

_LOOK_SECONDS = 0.25  # between two looks at whether a process still runs
_ASK_SECONDS = 1.0  # between two questions whether it takes requests
_LIST_SECONDS = 30.0  # between two questions which adapters it has; changes are asked for when they are made
_SILENT_SECONDS = 60.0  # one that has not answered for so long hangs, and is started again
_MOST_PAUSE = 30.0  # between two starts of one that keeps dying
_STEADY_SECONDS = 60.0  # one that ran for so long is started again without a pause


@dataclass(frozen=True)
class Change:
    """A change of the adapters that was asked for and made; one that is started again has to make it too."""

    method: str
    target: str
    body: bytes


class Fleet:
    """Replicas of one server.

    Attributes:
        replicas: All of them.
        client: Asks them.
        catalog: Which names they have told of.
        changing: Held while adapters are loaded or unloaded, and while a replica that was started again catches up.
        changes: What was changed since the start, in order.
        retries: Requests that were put to another replica.
        spills: Requests that did not go to their adapter's own replica because it had enough in hand.
    """

    def __init__(
        self, replicas: Sequence[Replica], *, key: str | None = None, client: httpx.AsyncClient | None = None
    ) -> None:
        """Put them together.

        Args:
            replicas: Not started yet.
            key: An API key of theirs, marked as admin; None if they have none.
            client: Asks them; by default one without limits on connections or on the time of an answer.
        """
        self.replicas = list(replicas)
        self.client = client or httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10.0, write=30.0),
            # Shorter than the replicas keep a connection: one that they are about to close is not used again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=10.0),
            trust_env=False,
        )
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.catalog = Catalog()
        self.changing = asyncio.Lock()
        self.changes: list[Change] = []
        self.retries = self.spills = 0
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all of them and wait until they take requests.

        Raises:
            ExecutionError: One did not come up; the others are ended.
        """
        try:
            await asyncio.gather(*(replica.start() for replica in self.replicas))
            await asyncio.gather(*(self.look(replica) for replica in self.replicas))
        except BaseException:
            await asyncio.gather(*(replica.kill() for replica in self.replicas))
            raise
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def stop(self, seconds: float) -> None:
        """End all of them; what they have in hand has so many seconds."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(replica.stop(seconds) for replica in self.replicas))
        await self.client.aclose()

    async def hurry(self) -> None:
        """Have them end the answers in hand now, each with an error that says so."""
        for watch in self._watches:
            watch.cancel()
        for _ in range(2):  # the second signal tells them not to wait
            for replica in self.replicas:
                replica.signal(signal.SIGTERM)
            await asyncio.sleep(0.3)  # two signals of a kind at once would be one

    # ---- choosing
    @property
    def ready(self) -> list[Replica]:
        """Those that take requests."""
        return [replica for replica in self.replicas if replica.state == "ready"]

    def choose(self, key: str | None, tried: Collection[int] = ()) -> Replica | None:
        """Who answers a request; None if nobody is left.

        Args:
            key: What it needs, see `Catalog.key`.
            tried: Who has been asked in vain.
        """
        loads = {replica.index: replica.in_hand for replica in self.ready}
        order = [index for index in preference(key, loads) if index not in tried]
        return self.replicas[order[0]] if order else None

    def failed(self, replica: Replica, error: Exception) -> None:
        """A replica could not be reached, or broke off: it is not asked again until it has answered the watch."""
        if replica.state == "ready":
            replica.state = "unready"
        facts = {
            "event": "replica_failed",
            "replica": replica.index,
            "error": f"{type(error).__name__}: {error}",
        }
        log.warning("failed", extra={"facts": facts})

    # ---- watching
    async def look(self, replica: Replica, *, adapters: bool = True) -> bool:
        """Ask a replica whether it takes requests, and perhaps for its adapters; whether it answered at all."""
        try:
            health = await self.client.get(f"{replica.url}/health/ready", timeout=10.0)
            if health.is_success:
                self.catalog.base = str(health.json()["model"])
            if health.is_success and adapters:
                url = f"{replica.url}/v1/adapters"
                listed = await self.client.get(url, headers=self.headers, timeout=10.0)
                if listed.is_success:
                    self.catalog.learn(listed.json()["data"])
        except httpx.TransportError:
            replica.state = "unready"
            return False
        replica.state = "ready" if health.is_success else "unready"
        return True

    async def _watch(self, replica: Replica) -> None:
        started = asked = answered = listed = time.monotonic()
        pause = 0.0
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            if replica.exit_code is None and now - answered < _SILENT_SECONDS:
                if now - asked >= _ASK_SECONDS or replica.state != "ready":
                    due = now - listed >= _LIST_SECONDS
                    if await self.look(replica, adapters=due):
                        answered = time.monotonic()
                        listed = answered if due else listed
                    asked = time.monotonic()
                continue
            replica.state = "dead"
            pause = 0.0 if now - started > _STEADY_SECONDS else min(_MOST_PAUSE, 2 * pause)
            facts = {
                "event": "replica_died",
                "replica": replica.index,
                "code": replica.exit_code,
                "pause_s": pause,
            }
            log.error("failed", extra={"facts": facts})
            await asyncio.sleep(pause)
            pause = max(pause, 0.5)
            started = time.monotonic()
            await self._restart(replica)
            asked = answered = listed = time.monotonic()

    async def _restart(self, replica: Replica) -> None:
        await replica.kill()
        replica.restarts += 1
        try:
            await replica.start()
            async with self.changing:
                for change in self.changes:
                    await self._make(replica, change)
                await self.look(replica)
        except Exception as error:  # the watch goes on, and tries again
            facts = {"event": "replica_restart_failed", "replica": replica.index, "error": str(error)}
            log.error("failed", extra={"facts": facts})
            return
        facts = {"event": "replica_restarted", "replica": replica.index, "changes": len(self.changes)}
        log.info("restarted", extra={"facts": facts})

    async def _make(self, replica: Replica, change: Change) -> None:
        answer = await self.send(replica, change.method, change.target, change.body, self.headers)
        if not answer.is_success:
            # 404: what is taken away or renamed here was never read by this process.
            facts = {
                "event": "replica_change_failed",
                "replica": replica.index,
                "change": f"{change.method} {change.target}",
                "status": answer.status_code,
                "error": answer.text[:300],
            }
            log.error("failed", extra={"facts": facts})

    async def send(
        self, replica: Replica, method: str, target: str, body: bytes, headers: dict[str, str]
    ) -> httpx.Response:
        """Ask one replica, for the whole answer."""
        sent = {**headers, "Content-Type": "application/json"} if body else headers
        return await self.client.request(method, replica.url + target, content=body, headers=sent)

    def state(self) -> list[dict[str, Any]]:
        """What is known of each."""
        return [
            {
                "replica": replica.index,
                "state": replica.state,
                "url": replica.url,
                "pid": replica.pid,
                "in_hand": replica.in_hand,
                "restarts": replica.restarts,
            }
            for replica in self.replicas
        ]
