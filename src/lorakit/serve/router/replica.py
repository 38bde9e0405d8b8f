"""One server process of several: how it is started, what is known of it, how it is ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Literal

from lorakit.errors import ExecutionError

State = Literal["starting", "ready", "unready", "dead"]

_SERVING = "serving"  # the word that begins the line with the address, the last one before requests are taken


class Replica:
    """A server in a process of its own, on a free port of this machine.

    Attributes:
        index: Its number, from 0; it keeps it when it is started again.
        url: Where it answers; empty until it does.
        state: Only a ready one is asked.
        in_hand: Requests that it is answering for the router.
        restarts: How often it was started again.
        told: The lines that it wrote before it took requests.
    """

    def __init__(self, index: int, command: Sequence[str]) -> None:
        """Prepare it.

        Args:
            index: Its number.
            command: The program. It writes ``serving URL`` to standard output when it takes requests, and ends
                when its standard input is closed: so none is left behind, however the router ends.
        """
        self.index, self.command = index, list(command)
        self.url = ""
        self.state: State = "starting"
        self.in_hand = self.restarts = 0
        self.told: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return None if self.process is None else self.process.pid

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return None if self.process is None else self.process.poll()

    async def start(self) -> None:
        """Start the process and wait until it takes requests; its log goes where the router's goes.

        Raises:
            ExecutionError: It ended before that; it has said why on standard error.
        """
        self.state, self.url, self.told = "starting", "", []
        # A session of its own: Ctrl-C in a terminal reaches the router alone, which ends its replicas in order.
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        loop = asyncio.get_running_loop()
        listening: asyncio.Future[str] = loop.create_future()
        arguments = (self.process, loop, listening)
        threading.Thread(
            target=self._listen, args=arguments, name=f"replica-{self.index}", daemon=True
        ).start()
        self.url = await listening
        if not self.url:
            code = await asyncio.to_thread(self.process.wait)
            self.state = "dead"
            raise ExecutionError(
                f"Replica {self.index} ended with code {code} before it took requests; what it said stands above."
            )

    def _listen(
        self, process: subprocess.Popen[str], loop: asyncio.AbstractEventLoop, listening: asyncio.Future[str]
    ) -> None:
        def tell(url: str) -> None:
            if not listening.done():
                listening.set_result(url)

        assert process.stdout is not None
        # The loop may be over when the last line comes.
        with contextlib.suppress(RuntimeError), process.stdout as lines:
            for line in lines:
                if line.startswith(_SERVING):
                    loop.call_soon_threadsafe(tell, line.split()[1].removesuffix("/v1"))
                else:
                    self.told.append(line.rstrip())
            loop.call_soon_threadsafe(tell, "")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def stop(self, seconds: float) -> None:
        """Let it complete what it has in hand, for so many seconds, and end it."""
        self.signal(signal.SIGTERM)
        await self._ended(seconds)

    async def kill(self) -> None:
        """End it at once."""
        await self._ended(0.0)

    async def _ended(self, seconds: float) -> None:
        if self.process is None:
            return
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.state = "dead"
