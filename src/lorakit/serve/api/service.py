"""What the handlers share: the server, the keys, the counts, and the way from a request to the engine's events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    MissingDependencyError,
    ModelNotFoundError,
    RequestAbortedError,
    ShuttingDownError,
    near_matches,
)
from lorakit.models.conversation import ConversationRenderer
from lorakit.serve.api.auth import Keys, Tenant
from lorakit.serve.api.errors import as_serve_error
from lorakit.serve.api.leasing import Leases, leased, release
from lorakit.serve.api.limits import Admission, Limits
from lorakit.serve.api.metrics import Metrics
from lorakit.serve.api.naming import Wanted, parse_model
from lorakit.serve.api.record import RequestRecord
from lorakit.serve.api.tokens import TokenTexts
from lorakit.serve.mixes import mix_name
from lorakit.serve.requests import Event, FinishEvent, GenerationRequest, PromptEvent, TokenEvent
from lorakit.serve.versions import Lease

if TYPE_CHECKING:
    from lorakit.serve.entries import AdapterEntry
    from lorakit.serve.server import Server
    from lorakit.serve.stream import Stream

T = TypeVar("T")

Make = Callable[["Lease | None"], GenerationRequest]
"""Makes the engine's request of one prompt, once its lease is there."""


@dataclass(frozen=True)
class Options:
    """How a server answers over HTTP.

    Attributes:
        max_tokens: Tokens of an answer when the request names no number.
        timeout: Seconds that a request may wait for its turn when it names none; None for ever.
        log_prompts: Write prompts to the log; without it no text of a request is ever written anywhere.
        limits: What is let in.
    """

    max_tokens: int = 256
    timeout: float | None = None
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)


class Service:
    """One server over HTTP.

    Attributes:
        server: The engine and the adapters.
        keys: Who may ask.
        options: How it answers.
        admission: What is in.
        metrics: Numbers.
        tokens: Tokens as text.
        draining: Whether nothing new is taken on.
    """

    def __init__(self, server: Server, keys: Keys | None = None, options: Options | None = None) -> None:
        self.server = server
        self.keys = keys or Keys()
        self.options = options or Options()
        self.admission = Admission(self.options.limits)
        self.metrics = Metrics(server)
        self.tokens = TokenTexts(server.tokenizer)
        self.draining = False
        # One thread: tokenizers change their own settings while they encode, and must not be called from several.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="lorakit-encode")

    def check_open(self) -> None:
        """Refuse what would not be answered.

        Raises:
            ShuttingDownError: Nothing new is taken on.
            EngineDeadError: The engine does not run.
        """
        if self.draining:
            raise ShuttingDownError("The server is about to stop and takes on nothing new.")
        if not self.server.engine.alive:
            raise EngineDeadError("The engine has stopped; it is being started again.")

    # ---- from names to leases
    def entries(self, tenant: Tenant) -> list[AdapterEntry]:
        """Every adapter that a tenant may use."""
        return [entry for entry in self.server.store.list() if tenant.sees(entry.name)]

    def wanted(self, text: str, tenant: Tenant) -> Wanted:
        """What a request names, if it exists for this tenant.

        Raises:
            ServeError: It does not, or the name makes no sense.
        """
        return self.visible(parse_model(text, self.server.name), tenant)

    def visible(self, wanted: Wanted, tenant: Tenant) -> Wanted:
        """The same, if every adapter of it exists for this tenant.

        Raises:
            ModelNotFoundError: One does not.
        """
        if not all(tenant.sees(name) for name in wanted.names):
            raise self._unknown(wanted, tenant)
        return wanted

    async def lease(self, wanted: Wanted, tenant: Tenant) -> Lease | None:
        """A hold on what a request names; None is the base.

        Raises:
            ServeError: It cannot be had.
        """
        store = self.server.store
        if not wanted.names:
            return None
        holder = uuid.uuid4().hex  # becomes the engine's id of the request, by which an unload can end it
        try:
            if wanted.name is not None:
                return await leased(store.acquire(wanted.name, holder=holder))
            return await leased(store.mix(wanted.mix, holder=holder))
        except ModelNotFoundError as error:
            if tenant.adapters == ("*",):
                raise
            raise self._unknown(wanted, tenant) from error  # the store's own words name what others have

    def _unknown(self, wanted: Wanted, tenant: Tenant) -> ModelNotFoundError:
        names = {entry.name for entry in self.entries(tenant)}
        missing = next((n for n in wanted.names if n.partition("@")[0] not in names), wanted.text)
        return ModelNotFoundError(
            f"There is no model {missing!r} here.{near_matches(missing, [self.server.name, *sorted(names)])}"
        )

    # ---- from text to tokens
    async def encode(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run the tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, partial(work, *arguments))

    def room(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """The most tokens that an answer may have.

        Args:
            prompt: Token ids.
            asked: What the request says.
            param: The field that holds the prompt.

        Raises:
            ContextLengthError: Prompt and answer together are too long.
            InvalidRequestError: The prompt is no prompt.
        """
        context = self.server.runner.context
        if not prompt:
            raise InvalidRequestError(
                "The prompt is empty: the model needs a token to go on from.", param=param
            )
        if max(prompt) >= self.server.runner.vocabulary:
            raise InvalidRequestError(
                f"The prompt holds the token id {max(prompt)}; the model knows {self.server.runner.vocabulary} tokens.",
                param=param,
            )
        left = context - len(prompt)
        if left < (asked or 1):
            wish = f" and {asked} were asked for" if asked else ""
            raise ContextLengthError(
                f"The context of this model is {context} tokens; the prompt has {len(prompt)}{wish}.",
                param=param,
            )
        return asked or min(self.options.max_tokens, left)

    # ---- to the engine and back
    @asynccontextmanager
    async def leases(self, record: RequestRecord, wanted: Wanted, count: int) -> AsyncIterator[Leases]:
        """A lease for each of several prompts; those that were not handed to the engine are given back.

        Raises:
            ServeError: The model cannot be had.
        """
        held = await self._leases(record, wanted, count)
        if (lease := held[0]) is not None:
            record.adapter = self._label(lease, wanted)
            record.digest = lease.version.digest
        try:
            yield held
        finally:
            release(held)

    def renderer(self, wanted: Wanted, record: RequestRecord) -> ConversationRenderer:
        """What makes prompts of conversations for a model that is held."""
        if not wanted.mix:
            return self.server.renderers.of([record.digest] if record.digest else [])
        entries = [self.server.store.entry(name) for name in wanted.mix]
        return self.server.renderers.of([entry.digest for entry in entries])

    def submit(self, leases: Leases, make: Sequence[Make]) -> list[Stream]:
        """Hand requests to the engine.

        Args:
            leases: One for each; the engine's from now on.
            make: What makes each request of its lease.

        Raises:
            ServeError: One of them was refused; then none is left running.
        """
        streams: list[Stream] = []
        try:
            for construct in make:
                streams.append(self._submit_one(construct, leases.pop(0)))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    async def _leases(self, record: RequestRecord, wanted: Wanted, count: int) -> Leases:
        """All on the same version, also while the name is given to another one."""
        while True:
            leases: Leases = []
            try:
                for _ in range(count):
                    leases.append(await self.lease(wanted, record.tenant))
            except BaseException:
                release(leases)
                raise
            if len({lease.version.digest for lease in leases if lease is not None}) <= 1:
                return leases
            release(leases)

    @staticmethod
    def _label(lease: Lease, wanted: Wanted) -> str:
        if wanted.mix:
            return mix_name(wanted.mix)
        return f"{lease.version.name}@{lease.version.version}"

    def _submit_one(self, construct: Make, lease: Lease | None) -> Stream:
        try:
            return self.server.engine.submit(construct(lease))
        except BaseException as error:
            if lease is not None:
                lease.release()  # a second time where the engine has done so, which does nothing
            if isinstance(error, (ConfigError, MissingDependencyError)):
                raise InvalidRequestError(str(error)) from error
            raise

    async def follow(
        self, record: RequestRecord, streams: Sequence[Stream], answers: int
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all answers as they come, each with the number of its answer; counts what goes by.

        What is told of a prompt is told once for each of its answers.

        Leaving early stops the engine's work on all of them.

        Raises:
            ServeError: An answer failed; the others are given up.
        """
        latest: dict[int, float] = {}
        record.prompt_tokens = record.completion_tokens = 0
        try:
            async for number, event in _together(streams):
                if isinstance(event, TokenEvent):
                    now = time.monotonic()
                    index = number * answers + event.index
                    if record.first_token is None:
                        record.first_token = now - record.started
                    if index in latest:
                        self.metrics.between(now - latest[index])
                    latest[index] = now
                    record.completion_tokens += 1
                    yield index, event
                elif isinstance(event, PromptEvent):
                    for index in range(answers):
                        yield number * answers + index, event
                else:
                    self._finish(record, event)
                    yield number * answers + event.index, event
        finally:
            for stream in streams:
                stream.cancel()

    @staticmethod
    def _finish(record: RequestRecord, event: FinishEvent) -> None:
        record.finish.append(event.reason)
        if event.index == 0:
            record.prompt_tokens = (record.prompt_tokens or 0) + event.usage.prompt_tokens
        if record.queued is None and event.timing is not None:
            record.queued = event.timing.admitted
        if event.error is not None:
            raise as_serve_error(event.error, record)
        if event.reason in ("abort", "error"):
            raise RequestAbortedError("The request was ended before its answer was complete.")

    def close(self) -> None:
        """End the service's own threads."""
        self._encoding.shutdown(wait=False, cancel_futures=True)


async def _together(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several streams as they come, each with its stream's number."""
    if len(streams) == 1:
        while (event := await streams[0].aget()) is not None:
            yield 0, event
        return
    waiting = {asyncio.ensure_future(stream.aget()): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                event = task.result()
                if event is not None:
                    waiting[asyncio.ensure_future(streams[number].aget())] = number
                    yield number, event
    finally:
        for task in waiting:
            task.cancel()
