"""Noticing that nobody waits for an answer any more."""

from __future__ import annotations

import asyncio

import pytest

from lorakit.errors import ClientDisconnectedError
from lorakit.serve.api.events import unless_gone


def test_work_for_a_client_that_went_away_is_given_up() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def go() -> None:
        with pytest.raises(ClientDisconnectedError):
            await unless_gone(receive, work())

    asyncio.run(go())
    assert ended == [True]
