"""Passing a request to a replica and its answer back; nothing is lost while nothing of the answer has gone out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import httpx
from starlette.types import Send

from lorakit.errors import EngineDeadError
from lorakit.serve.api.errors import error_text
from lorakit.serve.api.events import event
from lorakit.serve.api.record import log
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.placement import rendezvous
from lorakit.serve.router.replica import Replica

PATIENCE_SECONDS = 60.0
"""How long a request waits for a replica when none takes requests: the time to start one again."""

MOST_DEATHS = 3
"""A request that so many replicas did not survive is not given to another one."""

# Headers of one connection, not of the message; and those that the router writes itself.
_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
}
_NOT_SENT = _HOP | {"host", "content-length", "accept-encoding", "x-forwarded-for", "x-forwarded-proto"}
_NOT_RETURNED = _HOP | {"content-length", "date", "server", "x-request-id", "x-content-type-options"}

_ELSEWHERE = frozenset({503, 404})
"""A replica that is full, stops or has lost its engine; or one that has not read `name@2`, which another one has."""


@dataclass(frozen=True)
class Asked:
    """A request as it came.

    Attributes:
        method: Of HTTP.
        target: Path and query.
        headers: What is passed on of them, see `passed_headers`.
        body: All of it.
        request_id: In the log of whoever answers it.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    request_id: str


def passed_headers(headers: Mapping[str, str], request_id: str, client: str | None) -> dict[str, str]:
    """A client's headers as a replica gets them."""
    passed = {name: value for name, value in headers.items() if name.lower() not in _NOT_SENT}
    passed |= {"X-Request-Id": request_id, "Accept-Encoding": "identity"}
    if client:
        passed["X-Forwarded-For"] = client
    return passed


@dataclass
class Answer:
    """An answer of which nothing has gone out yet: its first piece is here."""

    replica: Replica
    response: httpx.Response
    first: bytes
    rest: AsyncGenerator[bytes, None] | None = None

    @property
    def head(self) -> list[tuple[bytes, bytes]]:
        """The headers for the client."""
        headers = [
            (name.lower(), value)
            for name, value in self.response.headers.raw
            if name.lower().decode("latin-1") not in _NOT_RETURNED
        ]
        headers.append((b"x-lorakit-replica", str(self.replica.index).encode()))
        if self.rest is None:
            headers.append((b"content-length", str(len(self.first)).encode()))
        return headers


@asynccontextmanager
async def answered(
    fleet: Fleet, asked: Asked, key: str | None, *, patience: float = PATIENCE_SECONDS
) -> AsyncGenerator[Answer, None]:
    """The answer to a request, from the replica that should give it or from the next one that can.

    A replica that cannot be reached, breaks off before the first piece of its answer, or says that it cannot
    (503, or 404 for what another one may have) is passed over. When nobody takes requests, it waits until one does.

    Yields:
        The answer; its replica has the request in hand for as long as the context lasts.

    Raises:
        EngineDeadError: Nobody was there to answer within ``patience`` seconds, or whoever began has died.
    """
    answer = await _found(fleet, asked, key, patience)
    answer.replica.in_hand += 1
    try:
        yield answer
    finally:
        answer.replica.in_hand -= 1
        await answer.response.aclose()


async def _found(fleet: Fleet, asked: Asked, key: str | None, patience: float) -> Answer:
    tried: set[int] = set()
    refusal: Answer | None = None
    deaths = 0
    end = time.monotonic() + patience
    _count_spill(fleet, key)
    while True:
        replica = fleet.choose(key, tried)
        if replica is None:
            if refusal is not None:
                return refusal
            if time.monotonic() > end:
                raise none_ready()
            tried.clear()
            await asyncio.sleep(0.05)
            continue
        replica.in_hand += 1
        try:
            answer = await _opened(fleet, replica, asked)
        except httpx.TransportError as error:
            fleet.failed(replica, error)
            deaths += not isinstance(error, httpx.ConnectError)
            if deaths == MOST_DEATHS:
                raise too_many_deaths() from error
            why = type(error).__name__
        else:
            if answer.response.status_code not in _ELSEWHERE:
                return answer
            # A full server's word is worth more to the client than another one's that has no such name.
            if refusal is None or answer.response.status_code == 503:
                refusal = answer
            why = f"status {answer.response.status_code}"
        finally:
            replica.in_hand -= 1
        tried.add(replica.index)
        fleet.retries += 1
        facts = {"event": "retried", "request_id": asked.request_id, "replica": replica.index, "error": why}
        log.info("retried", extra={"facts": facts})


def _count_spill(fleet: Fleet, key: str | None) -> None:
    ready = [replica.index for replica in fleet.ready]
    chosen = fleet.choose(key)
    if key is not None and chosen is not None and chosen.index != rendezvous(key, ready)[0]:
        fleet.spills += 1


async def _opened(fleet: Fleet, replica: Replica, asked: Asked) -> Answer:
    request = fleet.client.build_request(
        asked.method, replica.url + asked.target, content=asked.body, headers=dict(asked.headers)
    )
    response = await fleet.client.send(request, stream=True)
    try:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            return Answer(replica, response, await response.aread())
        events = _events(response)
        return Answer(replica, response, await anext(events, b""), events)
    except BaseException:
        await response.aclose()
        raise


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """A stream of events in pieces that end where events end: half of one could not be taken back."""
    held = b""
    async for piece in response.aiter_raw():
        held += piece
        whole = held.rfind(b"\n\n") + 2
        if whole > 1:
            yield held[:whole]
            held = held[whole:]
    if held:
        yield held


def none_ready() -> EngineDeadError:
    """What a client is told when there is nobody to answer."""
    return EngineDeadError("No replica takes requests; they are being started again.")


def too_many_deaths() -> EngineDeadError:
    """What a client is told whose request `MOST_DEATHS` replicas did not survive."""
    return EngineDeadError(
        f"{MOST_DEATHS} times a replica ended while it answered this request; it is not tried again."
    )


def broken_off() -> bytes:
    """The last event of a stream whose replica has died."""
    return event(
        error_text(EngineDeadError("The replica that wrote this answer has ended; ask again."))
    ).encode()


async def pass_back(fleet: Fleet, answer: Answer, send: Send) -> None:
    """Send an answer to the client; a stream whose replica dies ends with an error that says so."""
    head = {"type": "http.response.start", "status": answer.response.status_code, "headers": answer.head}
    await send(head)
    await send({"type": "http.response.body", "body": answer.first, "more_body": answer.rest is not None})
    if answer.rest is None:
        return
    last = b""
    try:
        async with aclosing(answer.rest) as rest:
            async for piece in rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx.TransportError as error:
        fleet.failed(answer.replica, error)
        last = broken_off()
    await send({"type": "http.response.body", "body": last, "more_body": False})
