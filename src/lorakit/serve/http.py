"""Running a server over HTTP with uvicorn: the socket, the signals, and the end without losing an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError
from lorakit.serve.api.app import create_app
from lorakit.serve.api.auth import Keys
from lorakit.serve.api.record import log_to_stderr
from lorakit.serve.api.service import Options, Service
from lorakit.serve.graceful import GracefulServer

if TYPE_CHECKING:
    from lorakit.serve.server import Server


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
        _Uvicorn(server, address, keys, options, grace, ready or (lambda url: None)).run([address])


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
        self._uvicorn = _Uvicorn(server, self._listening, keys, options, grace, self._ready)
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


class _Uvicorn(GracefulServer):
    """One server's."""

    def __init__(
        self,
        server: Server,
        listening: socket.socket,
        keys: Keys | None,
        options: Options | None,
        grace: float,
        ready: Callable[[str], None],
    ) -> None:
        app = create_app(server, keys, options)
        self.service: Service = app.state.service
        super().__init__(app, self.service, listening, grace, ready, lifespan="on", proxy_headers=True)

    async def _end(self, left: int, since: float) -> bool:
        over = await super()._end(left, since)
        if left:  # each of them is answered with an error of its own
            await asyncio.to_thread(self.service.server.engine.stop)
        return over
