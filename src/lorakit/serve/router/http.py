"""Running a router and its replicas on this machine, until a signal ends them without losing an answer."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvicorn

from lorakit.serve.api.auth import Keys
from lorakit.serve.api.limits import Limits
from lorakit.serve.api.record import log, log_to_stderr
from lorakit.serve.router.app import Router, router_keys, running
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.replica import Replica

_LAST_WORDS_SECONDS = 5.0  # after the grace: for telling the clients of what was ended


def serve_replicas(
    command: Sequence[str],
    number: int,
    address: socket.socket,
    *,
    keys: Path | None = None,
    limits: Limits | None = None,
    grace: float = 30.0,
    started: Callable[[list[str]], None] | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Start so many servers and answer for them until SIGTERM or Ctrl-C, as `serve_http` does for one.

    Args:
        command: Starts one of them, see `Replica`; the option ``--keys`` is added to it.
        number: How many.
        address: Where to listen, see `bind`.
        keys: The keys file.
        limits: What is let in, at all of them together.
        grace: Seconds for what is in hand when the end begins.
        started: Called with what the first replica told when it started.
        ready: Called with the URL once requests are taken.

    Raises:
        ConfigError: The keys file is not right.
        ExecutionError: A replica did not come up.
    """
    log_to_stderr()
    with ExitStack() as held:
        held.enter_context(address)
        command, secret = list(command), None
        if keys is not None:
            known = Keys.from_file(keys)
            secret = secrets.token_urlsafe(32)
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-")))
            file = folder / "keys.json"  # in a folder that nobody else may enter
            digest = hashlib.sha256(secret.encode()).hexdigest()
            file.write_text(router_keys(keys.read_text("utf-8"), digest), "utf-8")
            command += ["--keys", str(file)]
        else:
            known = Keys()

        async def serve() -> None:
            replicas = [Replica(index, command) for index in range(number)]
            async with running(Fleet(replicas, key=secret)) as fleet:
                if started is not None:
                    started(replicas[0].told)
                router = Router(fleet, known, limits)
                await _uvicorn(router, address, grace, ready or (lambda url: None)).serve([address])

        asyncio.run(serve())


def _uvicorn(
    router: Router, listening: socket.socket, grace: float, ready: Callable[[str], None]
) -> _Uvicorn:
    config = uvicorn.Config(
        router,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(_LAST_WORDS_SECONDS),
    )
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return _Uvicorn(config, router, grace, lambda: ready(url))


class _Uvicorn(uvicorn.Server):
    """uvicorn, which is told to stop only when the answers in hand are complete."""

    def __init__(
        self, config: uvicorn.Config, router: Router, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.router, self._grace, self._ready = router, grace, ready
        self._ending: float | None = None
        self._hurried: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one makes it short."""
        if self._ending is None:
            self._ending = time.monotonic()
            self.router.draining = True
        else:
            self._grace = 0.0
            self.force_exit = self.should_exit and sig == signal.SIGINT

    async def on_tick(self, counter: int) -> bool:
        if self._ending is not None and not self.should_exit:
            await self._end(time.monotonic())
        return await super().on_tick(counter)

    async def _end(self, now: float) -> None:
        left = self.router.admission.in_flight
        if left and now - (self._ending or now) < self._grace:
            return
        if left and self._hurried is None:  # each of them is answered with an error of its own
            self._hurried = now
            await self.router.fleet.hurry()
        if left and now - (self._hurried or now) < _LAST_WORDS_SECONDS:
            return
        facts = {"event": "stopping", "waited_ms": round((now - (self._ending or now)) * 1000)}
        log.info("stopping", extra={"facts": {**facts, "ended_unfinished": left}})
        self.should_exit = True
