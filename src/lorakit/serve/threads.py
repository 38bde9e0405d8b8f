"""Threads for what may take long or hang: reading adapters. A job that hangs is given up and does not block others."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)
_MOST_GIVEN_UP = 32


class Job:
    """One call.

    Attributes:
        call: What to do; it handles its own errors.
        state: ``"waiting"``, ``"running"``, ``"done"``, or ``"given up"``.
    """

    __slots__ = ("call", "state")

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.state = call, "waiting"


class LoadingThreads:
    """A few daemon threads that work through a queue, in order.

    A thread cannot be killed. When a job is given up while it runs, its thread is left to itself and another one takes
    its place, so that a dead network drive costs a thread and not the store. At most 32 may hang at a time;
    then jobs wait.
    """

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._wanted, self._given_up, self._started = count, 0, 0
        self._closed = False
        self._threads: set[threading.Thread] = set()

    def submit(self, call: Callable[[], None]) -> Job:
        """Have something called by one of the threads."""
        job = Job(call)
        with self._changed:
            self._queue.append(job)
            if len(self._threads) < self._wanted + self._given_up and not self._closed:
                self._start()
            self._changed.notify()
        return job

    def give_up(self, job: Job) -> bool:
        """Wait no longer for a job. Whether it had begun: then it may still be running."""
        with self._changed:
            if job.state == "running" and self._given_up < _MOST_GIVEN_UP:
                job.state = "given up"
                self._given_up += 1
                if self._queue:
                    self._start()
                return True
            if job.state == "waiting":
                job.state = "given up"
                self._queue.remove(job)
                return False
            return job.state == "running"

    def close(self, timeout: float) -> None:
        """Take nothing on any more, and wait for what is running."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout / max(1, len(threads)))

    def _start(self) -> None:
        self._started += 1
        thread = threading.Thread(target=self._work, name=f"adapter-loader-{self._started}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    self._threads.discard(threading.current_thread())
                    return
                job = self._queue.popleft()
                job.state = "running"
            try:
                job.call()
            except Exception:
                _log.exception("a loading job let an error through")
            with self._changed:
                if job.state == "given up":  # another thread has taken this one's place
                    self._given_up -= 1
                    self._threads.discard(threading.current_thread())
                    return
                job.state = "done"
