"""Serving on a Ray cluster: replicas of one base behind Ray Serve, each adapter with the replica that has it.

Ray Serve finds the replica that holds a "multiplexed model"; the id of it is set here, by the ingress, from the field
`model` of a request's body, so that OpenAI's clients need no header of Ray's. What Ray evicts is its own hold alone:
a request keeps its adapter through a lease of the adapter store, which frees memory when nobody uses it.

Adapters are read from a folder that all nodes see. They are not loaded and unloaded over HTTP, because Ray Serve
cannot ask all replicas at once: put a folder there, or take it away, instead.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lorakit.errors import EngineDeadError, InvalidRequestError, MissingDependencyError, ServeError
from lorakit.serve.api.errors import error_response
from lorakit.serve.api.exchange import replayed
from lorakit.serve.api.gate import ANSWERING
from lorakit.serve.router.catalog import Catalog
from lorakit.serve.router.passing import MOST_DEATHS, broken_off, too_many_deaths
from lorakit.serve.versions import Lease

try:
    from ray import serve
    from ray.exceptions import RayActorError, WorkerCrashedError
except ImportError as error:
    raise MissingDependencyError(
        "Serving on Ray needs ray, which is not installed. Install it with: pip install 'lorakit[ray]'"
    ) from error

_LOST = (RayActorError, WorkerCrashedError, ConnectionError)
_PASSED = ("authorization", "content-type", "x-request-id", "accept")

Message = dict[str, Any]


class HeldAdapter:
    """Ray's hold on an adapter: as long as Ray counts it among a replica's models, it stays in memory there."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def __del__(self) -> None:
        """Ray lets go of it; requests that use the adapter have leases of their own."""
        self._lease.release()


class RayReplica:
    """One server in one process of the cluster."""

    def __init__(self, base: str, adapters: str | None, keys: str | None, build: Mapping[str, Any]) -> None:
        from pathlib import Path

        from lorakit.serve.api.app import create_app
        from lorakit.serve.api.auth import Keys
        from lorakit.serve.server import build_server

        self.server = build_server(base, adapters, **build)
        self.app = create_app(self.server, None if keys is None else Keys.from_file(Path(keys)))
        self.server.start()

    async def adapter(self, name: str) -> HeldAdapter:
        """Have an adapter in memory; Ray keeps the result for as long as the replica counts as its home."""
        lease: Lease = await asyncio.wrap_future(self.server.store.acquire(name))
        return HeldAdapter(lease)

    async def ask(
        self, method: str, path: str, query: bytes, headers: Mapping[str, str], body: bytes
    ) -> AsyncGenerator[Message, None]:
        """Answer a request; the messages are those of ASGI, the first one with status and headers."""
        name = serve.get_multiplexed_model_id()
        if name:
            # The application says what is wrong with it, in the right form and for the right tenant.
            with suppress(ServeError):
                await self.adapter(name)
        messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=64)
        gone = asyncio.Event()

        async def until_gone() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await messages.put(dict(message))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": None,
            "server": None,
            "state": {},
        }

        async def run() -> None:
            try:
                await self.app(scope, replayed(body, until_gone), send)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"].append((b"x-lorakit-process", str(os.getpid()).encode()))
                yield message
            await running
        finally:
            gone.set()
            if not running.done():
                running.cancel()

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has died."""
        if not self.server.engine.alive:
            raise EngineDeadError("The engine has stopped.")


class RayIngress:
    """Takes the requests, tells Ray which adapter each of them needs, and asks again when a replica dies."""

    def __init__(self, replicas: Any, base: str) -> None:
        self._replicas = replicas.options(method_name="ask", stream=True)
        self._catalog = Catalog()
        self._catalog.base = base

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        path, body = request.url.path, await request.body()
        if path.startswith(("/v1/adapters", "/v1/load_lora", "/v1/unload_lora")) and request.method != "GET":
            return error_response(
                InvalidRequestError(
                    "On Ray, adapters are not loaded or unloaded over HTTP; put them into the adapter folder."
                )
            )
        key = self._catalog.key(path, body) if path in ANSWERING else None
        single = key if key is not None and ":" not in key and "+" not in key else None
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        handle = self._replicas.options(multiplexed_model_id=single) if single else self._replicas
        for deaths in range(1, MOST_DEATHS + 1):
            answer = handle.remote(request.method, path, request.scope["query_string"], headers, body)
            messages = answer.__aiter__()
            try:
                head, first = await anext(messages), await anext(messages)
            except _LOST:
                if deaths == MOST_DEATHS:
                    break
                continue
            return StreamingResponse(
                _rest(messages, first),
                head["status"],
                {name.decode("latin-1"): value.decode("latin-1") for name, value in head["headers"]},
            )
        return error_response(too_many_deaths())


async def _rest(messages: AsyncIterator[Message], first: Message) -> AsyncGenerator[bytes, None]:
    yield first.get("body", b"")
    try:
        async for message in messages:
            yield message.get("body", b"")
    except _LOST:
        yield broken_off()


def ray_application(
    base: str,
    adapters: str | None = None,
    *,
    name: str,
    replicas: int = 2,
    adapters_per_replica: int = 64,
    requests_per_replica: int = 64,
    cpus: float = 1.0,
    gpus: float = 0.0,
    keys: str | None = None,
    build: Mapping[str, Any] | None = None,
) -> Any:
    """A Ray Serve application, for ``serve.run(ray_application(...))`` on a cluster that is connected.

    Args:
        base: A folder that all nodes see, a built-in name, or a hub id.
        adapters: The folder of adapters, which all nodes see.
        name: What clients call the base.
        replicas: How many servers, each with its own copy of the base.
        adapters_per_replica: Ray's count of adapters for which a replica is home.
        requests_per_replica: Requests at a replica at a time; Ray holds back more.
        cpus: Of each replica.
        gpus: Of each replica.
        keys: A file of API keys that all nodes see.
        build: Further arguments of `build_server`.
    """
    adapter = serve.multiplexed(max_num_models_per_replica=adapters_per_replica)(RayReplica.adapter)
    counted = type("RayReplica", (RayReplica,), {"adapter": adapter, "__module__": __name__})
    several = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=requests_per_replica,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )(counted)
    ingress = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(RayIngress)
    return ingress.bind(several.bind(base, adapters, keys, {"name": name, **(build or {})}), name)
