"""The engine: one thread that owns the model, and runs the requests of everybody, of all adapters, in common steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InternalServeError,
    InvalidRequestError,
    RequestAbortedError,
    ServeError,
    ShuttingDownError,
)
from lorakit.serve.answer import Answer, Job
from lorakit.serve.engine_state import EngineState
from lorakit.serve.prefix import PrefixCache
from lorakit.serve.requests import GenerationRequest
from lorakit.serve.scheduler import EngineLimits, Scheduler
from lorakit.serve.steps import Steps
from lorakit.serve.stream import Stream
from lorakit.serve.structured import GrammarCompiler
from lorakit.serve.validation import check_queue, check_request

if TYPE_CHECKING:
    from lorakit.serve.kv import Slab
    from lorakit.serve.runner import ModelRunner
    from lorakit.serve.versions import AdapterVersion

_log = logging.getLogger("lorakit.serve")
_MOST_RESTARTS = 3
_RESTART_WINDOW = 60.0
_RATE_WINDOW = 10.0


class Engine:
    """Runs requests for many adapters of one model, in steps that they share."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Any,
        *,
        limits: EngineLimits | None = None,
        end_tokens: Iterable[int] | None = None,
        base: str = "",
    ) -> None:
        """Make one; `start` starts it.

        Args:
            runner: Computes the steps; the engine's thread is the only one that calls ``runner.step``.
            tokenizer: Of transformers.
            limits: How much is done at once.
            end_tokens: Tokens that end an answer; by default the tokenizer's end-of-text token.
            base: The base model's digest or name, part of the prefix cache's keys.
        """
        self.runner, self.tokenizer = runner, tokenizer
        self.limits = limits or EngineLimits()
        if end_tokens is None:
            own = getattr(tokenizer, "eos_token_id", None)
            end_tokens = () if own is None else (own,)
        self.end_tokens = frozenset(end_tokens)
        budget = self.limits.prefix_cache_bytes
        self._prefix = PrefixCache(budget, base) if budget else None
        self._scheduler = Scheduler(self.limits)
        self._steps = Steps(runner, self._prefix)
        self._jobs: dict[str, Job] = {}
        self._aborts: dict[str, Exception | None] = {}
        self._forgotten: deque[str] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._accepting, self._stopping, self._dead = True, False, False
        self._order = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._failures: deque[float] = deque()
        self._restarts = 0
        self._grammars = GrammarCompiler(tokenizer, runner.vocabulary, self.end_tokens)
        self._thread: threading.Thread | None = None

    # ---- life
    def start(self) -> Engine:
        """Start the engine's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lorakit-engine", daemon=True)
            self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._dead

    def drain(self, timeout: float | None = None) -> bool:
        """Take on nothing new, and wait until what there is has ended; False when that takes longer."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._jobs or not self.alive, timeout)

    def stop(self, timeout: float | None = 10.0) -> None:
        """End every request, and the thread."""
        with self._changed:
            self._accepting, self._stopping = False, True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # ---- requests
    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request. Its lease is the engine's from now on, also when this raises.

        Raises:
            ContextLengthError: Prompt and answer are longer than the model's context or the KV cache.
            InvalidRequestError: A token is not in the vocabulary, or the grammar cannot be followed.
            AdapterIncompatibleError: The adapter cannot be run here.
            OverloadedError: Too many requests wait.
            RateLimitError: Too many requests of this tenant wait.
            ShuttingDownError: The engine is being drained.
            EngineDeadError: It does not run.
        """
        try:
            self._check_open()
            check_request(request, self.runner, self.limits)
            grammar = request.grammar
            matcher = None if grammar is None else self._grammars.matcher(grammar)
            if request.lease is not None:
                self.runner.prepare(request.lease.version)
            with self._changed:
                self._check_open()
                if request.id in self._jobs:
                    raise InvalidRequestError(f"A request with the id {request.id!r} is running already.")
                check_queue(request, self._scheduler.queue, self.limits)
                stream = Stream(
                    request.id,
                    request.n,
                    most_events=self.limits.unread_events,
                    on_cancel=lambda: self.abort(request.id),
                )
                self._order += 1
                job = Job(request, stream, self._order, time.monotonic(), matcher)
                self._jobs[request.id] = job
                self._scheduler.queue.add(job)
                self._changed.notify_all()
                return stream
        except BaseException:
            if request.lease is not None:
                request.lease.release()
            raise

    def abort(self, request_id: str, error: Exception | None = None) -> None:
        """End a request before the next step; does nothing when it has ended.

        Args:
            request_id: Its id.
            error: What its reader is told; None when it was the reader who asked.
        """
        with self._changed:
            if request_id in self._jobs:
                self._aborts.setdefault(request_id, error)
                self._changed.notify_all()

    def abort_adapter(self, digest: str) -> int:
        """End every request of an adapter, as it is being unloaded by force; returns how many."""
        with self._changed:
            mine = [job.request.id for job in self._jobs.values() if job.digest == digest]
            for request_id in mine:
                self.abort(
                    request_id, RequestAbortedError("The adapter was unloaded while it was answering.")
                )
            return len(mine)

    def forget(self, version: AdapterVersion) -> None:
        """Let go of an adapter that no request uses, and of its cached prompts: for `AdapterStore`'s hook."""
        self.runner.forget(version)
        self._forgotten.append(version.digest)

    def state(self) -> EngineState:
        """What it is doing now."""
        with self._changed:
            scheduler, steps = self._scheduler, self._steps
            now = time.monotonic()
            recent = sum(count for at, count in self._recent if at > now - _RATE_WINDOW)
            return EngineState(
                len(scheduler.running),
                len(scheduler.queue),
                dict(Counter(_name(answer.job) for answer in scheduler.running)),
                dict(Counter(_name(job) for job in scheduler.queue)),
                steps.prompt_tokens,
                steps.generated_tokens,
                recent / _RATE_WINDOW,
                steps.count,
                steps.last,
                self.runner.arena.used,
                self.runner.arena.capacity,
                None if self._prefix is None else self._prefix.statistics,
                self._restarts,
            )

    def _check_open(self) -> None:
        if not self.alive:
            raise EngineDeadError("The engine is not running; no request can be answered.")
        if not self._accepting:
            raise ShuttingDownError("The server is shutting down and takes on no new requests.")

    # ---- the engine's thread
    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    if not self._cycle():
                        self._wait()
                except Exception:
                    _log.exception(
                        "The engine failed between steps; its running requests end, and it goes on."
                    )
                    if not self._recover():
                        break
        finally:
            self._dead = True
            ending: ServeError = (
                ShuttingDownError("The server stopped before the answer was complete.")
                if self._stopping
                else EngineDeadError("The engine failed again and again and was stopped.")
            )
            self._end(list(self._jobs.values()), ending)

    def _wait(self) -> None:
        with self._changed:
            if not (self._stopping or self._aborts):
                # Woken by whatever comes; and where somebody waits, to look at their deadlines.
                self._changed.wait(0.05 if len(self._scheduler.queue) else 1.0)

    def _recover(self) -> bool:
        """End what runs and go on; False when that has been needed too often."""
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] < now - _RESTART_WINDOW:
            self._failures.popleft()
        if len(self._failures) > _MOST_RESTARTS:
            return False
        self._restarts += 1
        with self._changed:
            running = list({id(answer.job): answer.job for answer in self._scheduler.running}.values())
        self._end(running, InternalServeError("The engine failed; the request was lost. Send it again."))
        return True

    def _cycle(self) -> bool:
        """One step; False when there was nothing to do."""
        now = time.monotonic()
        with self._changed:
            done = self._take_out(now)
            self._scheduler.admit(now, self._place)
            work = self._scheduler.plan()
        self._release(done)
        if work:
            before = self._steps.generated_tokens
            self._steps.run(work)
            with self._changed:
                self._recent.append((time.monotonic(), self._steps.generated_tokens - before))
                while self._recent[0][0] < now - _RATE_WINDOW:
                    self._recent.popleft()
                done = self._retire()
            self._release(done)
            for item in work:
                item.answer.job.tell()
        return bool(work)

    def _take_out(self, now: float) -> list[Job]:
        """End what was aborted or is too late; returns what has ended. Under the lock."""
        queue = self._scheduler.queue
        while self._forgotten and self._prefix is not None:
            self._prefix.forget(self._forgotten.popleft())
        ended = queue.expired(now)
        for job in ended:
            late = now - job.submitted
            job.end(
                "error",
                now,
                DeadlineExceededError(f"The request waited {late:.1f} seconds, past its deadline."),
            )
        for request_id, error in self._aborts.items():
            job = self._jobs[request_id]
            queue.remove(request_id)
            job.end("abort" if error is None else "error", now, error)
            ended.append(job)
        self._aborts.clear()
        return self._retire(ended)

    def _place(self, job: Job) -> bool:
        """Reserve what a request needs and make its answers; False while there is no room."""
        arena = self.runner.arena
        slabs: list[Slab] = []
        for _ in range(job.request.n):
            slab = arena.reserve(job.room)
            if slab is None:
                for taken in slabs:
                    taken.free()
                return False
            slabs.append(slab)
        job.answers = [
            Answer(job, index, slab, self.tokenizer, self.end_tokens) for index, slab in enumerate(slabs)
        ]
        first = job.answers[0]
        for other in job.answers[1:]:
            other.leader = first
        if self._prefix is not None and job.request.prompt_logprobs is None:
            job.cached = self._prefix.fetch(first.tokens, job.digest, job.request.tenant, first.slab)
            first.read = job.cached
        return True

    def _retire(self, ended: Sequence[Job] = ()) -> list[Job]:
        """Take out what was ended, and the running requests whose answers have all ended. Under the lock."""
        finished = (answer.job for answer in self._scheduler.running if answer.finished)
        done = [
            job for job in dict.fromkeys([*ended, *finished]) if job.ended and job.request.id in self._jobs
        ]
        for job in done:
            del self._jobs[job.request.id]
            self._aborts.pop(job.request.id, None)
            self._scheduler.queue.left(job)
        if done:
            self._scheduler.drop_finished()
            self._changed.notify_all()
        return done

    def _end(self, jobs: list[Job], error: ServeError) -> None:
        with self._changed:
            for job in jobs:
                self._scheduler.queue.remove(job.request.id)
                job.end("error", time.monotonic(), error)
            done = self._retire(jobs)
        self._release(done)

    def _release(self, jobs: list[Job]) -> None:
        """Give the adapters back, then tell the readers. Not under the lock: the store has one of its own."""
        for job in jobs:
            try:
                job.release()
            except Exception:
                _log.exception("The adapter of request %s could not be given back.", job.request.id)
            job.tell()


def _name(job: Job) -> str | None:
    return None if job.version is None else job.version.name
