"""The router's application: what it answers itself, what all replicas answer together, and what one of them answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from urllib.parse import quote

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lorakit.errors import ShuttingDownError
from lorakit.serve.api.auth import Keys
from lorakit.serve.api.events import unless_gone
from lorakit.serve.api.exchange import answer_failure, read_body, record_of, stamped
from lorakit.serve.api.gate import ANSWERING
from lorakit.serve.api.limits import Admission, Limits
from lorakit.serve.router.changing import change_all
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.passing import Asked, answered, none_ready, pass_back, passed_headers
from lorakit.serve.router.totals import added, merged, merged_lists, metrics_text

_LISTS = ("/v1/models", "/v1/adapters")
_VLLM = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Router:
    """An ASGI application in front of several servers of one base.

    Attributes:
        fleet: The servers.
        keys: Who may ask; the servers know the same keys.
        admission: What is in, at all of them together: limits count here, not at each.
        draining: Whether nothing new is taken on.
    """

    def __init__(self, fleet: Fleet, keys: Keys | None = None, limits: Limits | None = None) -> None:
        self.fleet, self.keys = fleet, keys or Keys()
        self.admission = Admission(limits or Limits())
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        record = record_of(scope, headers)
        send = stamped(send, record)
        try:
            with ExitStack() as held:
                if scope["path"] in ANSWERING and scope["method"] == "POST":
                    self._check_open()
                    record.tenant = self.keys.tenant(headers.get("authorization"))
                    held.enter_context(self.admission.request(record.tenant))
                hold = held.enter_context(self.admission.body())
                body = await read_body(headers, receive, self.admission, hold)
                target = quote(scope["path"], safe="/@:+,;=~!$&'()*")
                if scope["query_string"]:
                    target += "?" + scope["query_string"].decode("latin-1")
                passed = passed_headers(headers, record.id, record.client)
                asked = Asked(scope["method"], target, passed, body, record.id)
                await unless_gone(receive, self._answer(scope, receive, send, asked, headers))
        except Exception as error:
            await answer_failure(error, record, scope, receive, send)
            record.write()  # what a replica answered is in its log

    def _check_open(self) -> None:
        if self.draining:
            raise ShuttingDownError("The server is about to stop and takes on nothing new.")

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, asked: Asked, headers: Headers
    ) -> None:
        path, method = scope["path"], asked.method
        if path in ANSWERING:
            async with answered(self.fleet, asked, self.fleet.catalog.key(path, asked.body)) as answer:
                await pass_back(self.fleet, answer, send)
            return
        response: Response | None = None
        if path == "/health/live" and method == "GET":
            response = JSONResponse({"status": "live"})
        elif path in ("/health", "/health/ready") and method == "GET":
            response = self._ready()
        elif path in ("/metrics", "/v1/state") and method == "GET":
            self.keys.tenant(headers.get("authorization")).require_admin()
            response = await (self._metrics() if path == "/metrics" else self._state())
        elif path.startswith(_LISTS) and method == "GET":
            response = await self._told_by_all(asked)
        elif path in _VLLM or (path.startswith("/v1/adapters") and method in ("POST", "DELETE")):
            # A change that has begun is made everywhere, whether or not its client waits for it.
            response = _of(await asyncio.shield(change_all(self.fleet, asked)))
        if response is not None:
            await response(scope, receive, send)
            return
        async with answered(self.fleet, asked, None) as answer:  # the page, what is nowhere
            await pass_back(self.fleet, answer, send)

    def _ready(self) -> Response:
        self._check_open()
        ready = len(self.fleet.ready)
        if not ready:
            raise none_ready()
        base = self.fleet.catalog.base
        body = {"status": "ready", "model": base, "replicas": len(self.fleet.replicas), "ready": ready}
        return JSONResponse(body)

    async def _told_by_all(self, asked: Asked) -> Response:
        answers = await self._gather(asked.target, asked.headers)
        good = {index: answer.json() for index, answer in answers.items() if answer.is_success}
        if not good:
            if not answers:
                raise none_ready()
            return _of(next(iter(answers.values())))
        if asked.target.partition("?")[0] in _LISTS:
            data = merged_lists({index: body["data"] for index, body in good.items()})
            return JSONResponse({"object": "list", "data": data})
        return JSONResponse(merged(good))

    async def _metrics(self) -> Response:
        answers = await self._gather("/metrics", self.fleet.headers)
        texts = {index: answer.text for index, answer in answers.items() if answer.is_success}
        return Response(metrics_text(texts, self.fleet), media_type=CONTENT_TYPE_LATEST)

    async def _state(self) -> Response:
        answers = await self._gather("/v1/state", self.fleet.headers)
        whole = added([answer.json() for answer in answers.values() if answer.is_success]) or {}
        router = {"retries": self.fleet.retries, "spills": self.fleet.spills}
        body = {
            **whole,
            "draining": self.draining,
            "http_in_flight": self.admission.in_flight,
            "router": router,
            "replicas": self.fleet.state(),
        }
        return JSONResponse(body)

    async def _gather(self, target: str, headers: Mapping[str, str]) -> dict[int, httpx.Response]:
        """What every replica that takes requests answers; one that cannot be reached is left out."""
        ready = self.fleet.ready

        async def ask(url: str) -> httpx.Response:
            return await self.fleet.client.get(url + target, headers=dict(headers), timeout=30.0)

        answers = await asyncio.gather(*(ask(replica.url) for replica in ready), return_exceptions=True)
        found: dict[int, httpx.Response] = {}
        for replica, answer in zip(ready, answers, strict=True):
            if isinstance(answer, httpx.Response):
                found[replica.index] = answer
            elif isinstance(answer, httpx.TransportError):
                self.fleet.failed(replica, answer)
            else:
                raise answer
        return found


def _of(answer: httpx.Response) -> Response:
    kept = ("content-type", "retry-after", "www-authenticate")
    headers = {name: answer.headers[name] for name in kept if name in answer.headers}
    return Response(answer.content, answer.status_code, headers)


@asynccontextmanager
async def running(fleet: Fleet) -> AsyncIterator[Fleet]:
    """A fleet that is started, and ended with the context.

    Raises:
        ExecutionError: A replica did not come up.
    """
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.stop(10.0)


def router_keys(text: str, secret_digest: str) -> str:
    """A keys file for the replicas: the server's own keys, and one more with which the router asks them.

    Args:
        text: The server's keys file.
        secret_digest: SHA-256 of the router's key, in hex.
    """
    keys = json.loads(text)
    own = {"sha256": secret_digest, "tenant": "lorakit-router", "adapters": ["*"], "admin": True}
    return json.dumps({"keys": [*keys["keys"], own]})
