"""Running a server over HTTP with uvicorn: the socket, the signals, and the end without losing an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from lorakit.errors import ConfigError
from lorakit.serve.api.app import create_app
from lorakit.serve.api.auth import Keys
from lorakit.serve.api.record import log, log_to_stderr
from lorakit.serve.api.service import Options, Service
from lorakit.serve.server import Server

_LAST_WORDS_SECONDS = 5  # after the grace: for telling the clients of what was ended


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before the model is loaded; who connects is refused until requests are taken.

    Args:
        host: The address to listen at.
        port: The port; 0 takes a free one.

    Raises:
        ConfigError: The address cannot be had.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"The server cannot listen at {host}:{port}: {error.strerror or error}. "
            "Another --port, or --port 0 for any free one, may do."
        ) from error


def serve_http(
    server: Server,
    address: socket.socket,
    *,
    keys: Keys | None = None,
    options: Options | None = None,
    grace: float = 30.0,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C.

    The first signal begins the end: new requests are answered with 503, those in hand have ``grace`` seconds to be
    completed. What is left then is ended, and its clients are told. A second signal does not wait.

    Args:
        server: What answers.
        address: Where to listen, see `bind`.
        keys: Who may ask.
        options: How requests are answered.
        grace: Seconds for what is in hand when the end begins.
        ready: Called with the URL once requests are taken.
    """
    log_to_stderr()
    with address:
        _uvicorn(server, address, keys, options, grace, ready or (lambda url: None)).run([address])


class HttpThread:
    """The same in a thread of its own, for programs that do something else too: notebooks, tests.

    Attributes:
        url: Where it answers, once started.
        service: What the handlers share.
        thread: It runs in this one.
    """

    def __init__(
        self,
        server: Server,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        keys: Keys | None = None,
        options: Options | None = None,
        grace: float = 30.0,
    ) -> None:
        """Prepare it; arguments are those of `serve_http`."""
        self._listening = bind(host, port)
        self._is_ready = threading.Event()
        self._uvicorn = _uvicorn(server, self._listening, keys, options, grace, self._ready)
        self.url = ""
        self.service: Service = self._uvicorn.service
        self.thread = threading.Thread(target=self._run, name="lorakit-http", daemon=True)

    def start(self) -> None:
        """Start, and wait until requests are taken."""
        self.thread.start()
        self._is_ready.wait()

    def stop(self) -> None:
        """Complete what is in hand, as `serve_http` does at its first signal, and end."""
        self._uvicorn.handle_exit(signal.SIGTERM, None)
        self.thread.join()

    def _run(self) -> None:
        with self._listening:
            self._uvicorn.run([self._listening])

    def _ready(self, url: str) -> None:
        self.url = url
        self._is_ready.set()


def _uvicorn(
    server: Server,
    listening: socket.socket,
    keys: Keys | None,
    options: Options | None,
    grace: float,
    ready: Callable[[str], None],
) -> _Uvicorn:
    app = create_app(server, keys, options)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return _Uvicorn(config, app.state.service, grace, lambda: ready(url))


class _Uvicorn(uvicorn.Server):
    """uvicorn, which is told to stop only when the answers in hand are complete."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service, self._grace, self._ready = service, grace, ready
        self._ending: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one makes it short."""
        if self._ending is None:
            self._ending = time.monotonic()
            self.service.draining = True
        else:
            self._grace = 0.0
            self.force_exit = self.should_exit and sig == signal.SIGINT

    async def on_tick(self, counter: int) -> bool:
        if self._ending is not None and not self.should_exit:
            await self._end(time.monotonic() - self._ending)
        return await super().on_tick(counter)

    async def _end(self, since: float) -> None:
        left = self.service.admission.in_flight
        if left and since < self._grace:
            return
        facts = {"event": "stopping", "waited_ms": round(since * 1000), "ended_unfinished": left}
        log.info("stopping", extra={"facts": facts})
        if left:  # each of them is answered with an error of its own
            await asyncio.to_thread(self.service.server.engine.stop)
        self.should_exit = True
