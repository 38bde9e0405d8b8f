"""Loading, unloading, pinning and naming adapters at all replicas: all do it, or none has it afterwards."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

from lorakit.errors import EngineDeadError
from lorakit.serve.api.record import log
from lorakit.serve.router.fleet import Change, Fleet
from lorakit.serve.router.passing import Asked
from lorakit.serve.router.replica import Replica
from lorakit.serve.router.totals import merged


async def change_all(fleet: Fleet, asked: Asked) -> httpx.Response:
    """Have every replica make a change, one change after the other, and remember it for those that start later.

    A replica that cannot be reached is ended: it is started again and then makes every change. When some make it
    and some refuse, a load under a new name is undone where it was made.

    Returns:
        The answer: a refusal if there is one, else what the replicas say together.
    """
    async with fleet.changing:
        answers = await _ask_all(fleet, asked)
        if _is_of_known(asked) and any(answer.status_code == 404 for answer in answers.values()):
            await _have_read(fleet, asked, [i for i, answer in answers.items() if answer.status_code == 404])
            answers = await _ask_all(fleet, asked)
        made = {index: answer for index, answer in answers.items() if answer.is_success}
        refused = {index: answer for index, answer in answers.items() if not answer.is_success}
        if _takes_away(asked):
            # A replica that never read it may have nothing to take away.
            refused = {i: answer for i, answer in refused.items() if answer.status_code != 404 or not made}
        if not answers:
            return _none()
        if refused:
            if any(answer.status_code != 409 for answer in refused.values()):  # 409: those have it already
                await _undo(fleet, asked, made)
            return next(iter(refused.values()))
        fleet.changes.append(Change(asked.method, asked.target, asked.body))
        if _takes_away(asked):
            fleet.catalog.forget(_name(asked))
        await asyncio.gather(*(fleet.look(fleet.replicas[index]) for index in made))
        return _together(made)


async def _ask_all(fleet: Fleet, asked: Asked, only: list[int] | None = None) -> dict[int, httpx.Response]:
    live = [replica for replica in fleet.replicas if replica.url and replica.state in ("ready", "unready")]

    async def ask(replica: Replica) -> httpx.Response | None:
        try:
            return await fleet.client.request(
                asked.method, replica.url + asked.target, content=asked.body, headers=dict(asked.headers)
            )
        except httpx.TransportError as error:
            fleet.failed(replica, error)
            await replica.kill()
            return None

    chosen = [replica for replica in live if only is None or replica.index in only]
    answers = await asyncio.gather(*(ask(replica) for replica in chosen))
    return {r.index: answer for r, answer in zip(chosen, answers, strict=True) if answer is not None}


def _is_of_known(asked: Asked) -> bool:
    """Whether it is done to an adapter that must have been read before: pinning it, naming it."""
    return asked.method == "POST" and asked.target.endswith(("/pin", "/alias"))


def _takes_away(asked: Asked) -> bool:
    return asked.method == "DELETE" or asked.target == "/v1/unload_lora_adapter"


async def _have_read(fleet: Fleet, asked: Asked, replicas: list[int]) -> None:
    """Have replicas read an adapter of the folder that requests have led to others alone."""
    name = _name(asked).partition("@")[0]
    headers = {**asked.headers, "content-type": "application/json"}
    load = Asked("POST", "/v1/adapters", headers, json.dumps({"name": name}).encode(), asked.request_id)
    if any(answer.is_success for answer in (await _ask_all(fleet, load, replicas)).values()):
        fleet.changes.append(Change(load.method, load.target, load.body))


async def _undo(fleet: Fleet, asked: Asked, made: dict[int, httpx.Response]) -> None:
    body = _body(asked)
    name = body.get("name") or body.get("lora_name")
    replaced = body.get("if_exists") == "replace" or body.get("load_inplace")
    if not made or asked.method != "POST" or replaced or not isinstance(name, str):
        if made:
            facts = {
                "event": "replicas_differ",
                "change": f"{asked.method} {asked.target}",
                "made": list(made),
            }
            log.error("failed", extra={"facts": facts})
        return
    undo = Asked("DELETE", f"/v1/adapters/{name}", asked.headers, b"", asked.request_id)
    await _ask_all(fleet, undo, list(made))


def _name(asked: Asked) -> str:
    body = _body(asked)
    if asked.target.startswith("/v1/adapters/"):
        path = unquote(urlsplit(asked.target).path).removeprefix("/v1/adapters/")
        return path.removesuffix("/pin").removesuffix("/alias")
    return str(body.get("name") or body.get("lora_name") or "")


def _body(asked: Asked) -> dict[str, Any]:
    try:
        body = json.loads(asked.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _together(made: dict[int, httpx.Response]) -> httpx.Response:
    first = next(iter(made.values()))
    if not first.headers.get("content-type", "").startswith("application/json"):
        return first
    bodies = {index: answer.json() for index, answer in made.items()}
    whole = merged(bodies)
    if "status" in whole:
        whole["status"] = "draining" if whole["in_flight"] else "unloaded"
    return httpx.Response(first.status_code, json=whole)


def _none() -> httpx.Response:
    error = EngineDeadError("No replica can be reached; they are being started again.")
    return httpx.Response(error.status, json=error.body(), headers={"Retry-After": "5"})
