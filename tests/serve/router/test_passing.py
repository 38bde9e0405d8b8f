"""Passing requests on: replicas that refuse, cannot be reached, or die at every moment of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from lorakit.errors import EngineDeadError
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.passing import MOST_DEATHS, Asked, answered, pass_back, passed_headers
from lorakit.serve.router.placement import rendezvous
from lorakit.serve.router.replica import Replica

ASKED = Asked("POST", "/v1/chat/completions", {}, b"{}", "req-1")
FIRST, SECOND = rendezvous("sql", range(2))

Handler = Callable[[], httpx.Response]


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; an exception among them is a connection that breaks there."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces, self.closed = pieces, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


def stream(*pieces: bytes | Exception) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Pieces(*pieces))


def broken(error: Exception) -> Handler:
    def handle() -> httpx.Response:
        raise error

    return handle


def fleet_of(first: Handler, second: Handler) -> tuple[Fleet, list[int]]:
    """Two replicas, ``first`` the home of the adapter; and who was asked."""
    asked: list[int] = []
    handlers = {FIRST: first, SECOND: second}

    async def handle(request: httpx.Request) -> httpx.Response:
        index = int(request.url.host.removeprefix("replica-"))
        asked.append(index)
        return handlers[index]()

    replicas = [Replica(index, []) for index in range(2)]
    for replica in replicas:
        replica.url, replica.state = f"http://replica-{replica.index}", "ready"
    return Fleet(replicas, client=httpx.AsyncClient(transport=httpx.MockTransport(handle))), asked


def passed(fleet: Fleet, *, patience: float = 0.2) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body as the client gets them."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def go() -> None:
        async with answered(fleet, ASKED, "sql", patience=patience) as answer:
            assert fleet.replicas[answer.replica.index].in_hand == 1
            await pass_back(fleet, answer, send)

    try:
        asyncio.run(go())
    finally:
        assert [replica.in_hand for replica in fleet.replicas] == [0, 0]
    assert [message.get("more_body") for message in sent][-1] is False
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:])


def good() -> httpx.Response:
    return httpx.Response(200, json={"ok": 1}, headers={"connection": "close", "x-adapter-version": "sql@1"})


def test_the_home_answers() -> None:
    fleet, asked = fleet_of(good, good)
    status, headers, body = passed(fleet)
    assert (status, body, asked) == (200, b'{"ok":1}', [FIRST])
    assert headers["x-lorakit-replica"] == str(FIRST)
    assert headers["x-adapter-version"] == "sql@1"
    assert "connection" not in headers


@pytest.mark.parametrize(
    "first",
    [
        lambda: httpx.Response(503, json={"error": {"code": "shutting_down"}}),
        lambda: httpx.Response(404, json={"error": {"code": "model_not_found"}}),
        broken(httpx.ConnectError("nobody there")),
        broken(httpx.RemoteProtocolError("Server disconnected without sending a response.")),
        lambda: httpx.Response(200, stream=Pieces(b'{"half', httpx.ReadError("broken"))),
        lambda: stream(httpx.ReadError("broken before the first event")),
    ],
)
def test_nothing_is_lost_before_the_first_byte(first: Handler) -> None:
    fleet, asked = fleet_of(first, good)
    status, headers, body = passed(fleet)
    assert (status, body, asked) == (200, b'{"ok":1}', [FIRST, SECOND])
    assert headers["x-lorakit-replica"] == str(SECOND)
    assert fleet.retries == 1


@pytest.mark.parametrize("status", [400, 401, 409, 424, 429, 500])
def test_other_refusals_are_the_answer(status: int) -> None:
    fleet, asked = fleet_of(lambda: httpx.Response(status, json={}), good)
    assert passed(fleet)[0] == status
    assert asked == [FIRST]


def test_when_all_refuse_the_one_that_is_full_is_heard() -> None:
    full, unknown = (lambda: httpx.Response(503, headers={"retry-after": "7"})), (lambda: httpx.Response(404))
    for first, second in ((full, unknown), (unknown, full)):
        status, headers, _ = passed(fleet_of(first, second)[0])
        assert (status, headers["retry-after"]) == (503, "7")


def test_a_stream_passes_piece_by_piece_and_ends_with_an_error_when_its_replica_dies() -> None:
    whole, _ = fleet_of(lambda: stream(b"data: 1\n\nda", b"ta: 2\n\n", b"data: [DONE]\n\n"), good)
    assert passed(whole)[2] == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    dying, asked = fleet_of(lambda: stream(b"data: 1\n\nda", httpx.ReadError("killed")), good)
    _, _, body = passed(dying)
    events = body.decode().split("\n\n")
    assert events[0] == "data: 1"
    assert '"code": "engine_dead"' in events[1]
    assert events[2:] == [""]
    assert asked == [FIRST], "an answer that has begun cannot be begun again"


def test_a_request_that_kills_is_not_given_to_one_replica_after_the_other() -> None:
    fleet, asked = fleet_of(broken(httpx.ReadError("killed")), broken(httpx.ReadError("killed")))

    async def revive() -> None:
        while True:
            for replica in fleet.replicas:
                replica.state = "ready"
            await asyncio.sleep(0.01)

    async def go() -> None:
        reviving = asyncio.create_task(revive())
        with pytest.raises(EngineDeadError, match="not tried again"):
            async with answered(fleet, ASKED, "sql", patience=10):
                pass
        reviving.cancel()

    asyncio.run(go())
    assert len(asked) == MOST_DEATHS


def test_it_waits_for_a_replica_to_come_back_but_not_for_ever() -> None:
    fleet, _ = fleet_of(good, good)
    for replica in fleet.replicas:
        replica.state = "dead"
    with pytest.raises(EngineDeadError, match="No replica"):
        passed(fleet)

    async def go() -> int:
        asyncio.get_running_loop().call_later(0.1, setattr, fleet.replicas[0], "state", "ready")
        async with answered(fleet, ASKED, "sql", patience=10) as answer:
            return answer.replica.index

    assert asyncio.run(go()) == 0


def test_a_busy_home_passes_new_requests_on() -> None:
    fleet, asked = fleet_of(good, good)
    fleet.replicas[FIRST].in_hand = 4

    async def go() -> None:
        async with answered(fleet, ASKED, "sql"):
            pass

    asyncio.run(go())
    assert asked == [SECOND]
    assert fleet.spills == 1


def test_headers_of_the_connection_stay_behind() -> None:
    given = {
        "host": "x",
        "connection": "keep-alive",
        "authorization": "Bearer k",
        "x-forwarded-for": "6.6.6.6",
    }
    assert passed_headers(given, "req-1", "10.0.0.1") == {
        "authorization": "Bearer k",
        "X-Request-Id": "req-1",
        "Accept-Encoding": "identity",
        "X-Forwarded-For": "10.0.0.1",
    }
