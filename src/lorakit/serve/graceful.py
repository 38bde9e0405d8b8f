"""uvicorn that ends without losing an answer: what a server and a router in front of several have in common."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Literal, Protocol

import uvicorn
from starlette.types import ASGIApp

from lorakit.serve.api.limits import Admission
from lorakit.serve.api.record import log

LAST_WORDS_SECONDS = 5
"""After the grace: for telling the clients of what was ended."""


class Door(Protocol):
    """What knows which requests are in, and can be told to let in nothing new.

    Attributes:
        admission: What is in.
        draining: Whether nothing new is taken on.
    """

    admission: Admission
    draining: bool


class GracefulServer(uvicorn.Server):
    """uvicorn, which is told to stop only when the answers in hand are complete."""

    def __init__(
        self,
        app: ASGIApp,
        door: Door,
        listening: socket.socket,
        grace: float,
        ready: Callable[[str], None],
        *,
        lifespan: Literal["on", "off"],
        proxy_headers: bool,
    ) -> None:
        """Prepare it.

        Args:
            app: What answers.
            door: Counts what is in hand, and is closed when the end begins.
            listening: Where to listen, see `lorakit.serve.http.bind`.
            grace: Seconds for what is in hand when the end begins.
            ready: Called with the URL once requests are taken.
            lifespan: Whether the application wants to be told of start and end.
            proxy_headers: Whether a proxy on this machine may say who the client is.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=proxy_headers,
                ws="none",
                lifespan=lifespan,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
            )
        )
        host, port = listening.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._door, self._grace, self._ready = door, grace, ready
        self._ending: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one makes it short."""
        if self._ending is None:
            self._ending = time.monotonic()
            self._door.draining = True
        else:
            self._grace = 0.0
            self.force_exit = self.should_exit and sig == signal.SIGINT

    async def on_tick(self, counter: int) -> bool:
        if self._ending is not None and not self.should_exit:
            since = time.monotonic() - self._ending
            left = self._door.admission.in_flight
            if (not left or since >= self._grace) and await self._end(left, since):
                self.should_exit = True
        return await super().on_tick(counter)

    async def _end(self, left: int, since: float) -> bool:
        """Nothing is in hand any more, or the grace is over; False to be asked again at the next tick.

        Args:
            left: Requests that are still in hand.
            since: Seconds since the end began.
        """
        facts = {"event": "stopping", "waited_ms": round(since * 1000), "ended_unfinished": left}
        log.info("stopping", extra={"facts": facts})
        return True
