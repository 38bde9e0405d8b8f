"""Running a router and its replicas on this machine, until a signal ends them without losing an answer."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lorakit.serve.api.auth import Keys
from lorakit.serve.api.limits import Limits
from lorakit.serve.api.record import log_to_stderr
from lorakit.serve.graceful import LAST_WORDS_SECONDS, GracefulServer
from lorakit.serve.router.app import Router, router_keys, running
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.replica import Replica


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
                await _Uvicorn(router, address, grace, ready or (lambda url: None)).serve([address])

        asyncio.run(serve())


class _Uvicorn(GracefulServer):
    """The router's."""

    def __init__(
        self, router: Router, listening: socket.socket, grace: float, ready: Callable[[str], None]
    ) -> None:
        super().__init__(router, router, listening, grace, ready, lifespan="off", proxy_headers=False)
        self._fleet = router.fleet
        self._hurried: float | None = None

    async def _end(self, left: int, since: float) -> bool:
        if left:
            if self._hurried is None:  # each of them is answered with an error of its own
                self._hurried = since
                await self._fleet.hurry()
            if since - self._hurried < LAST_WORDS_SECONDS:
                return False
        return await super()._end(left, since)
