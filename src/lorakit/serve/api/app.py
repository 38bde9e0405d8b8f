"""The application: its routes, its errors, and the gate around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

import lorakit
from lorakit.errors import ServeError
from lorakit.serve.api import adapters, chat, completions, errors, health, lorax
from lorakit.serve.api.auth import Keys
from lorakit.serve.api.gate import Gate
from lorakit.serve.api.page import add_page
from lorakit.serve.api.record import log
from lorakit.serve.api.service import Options, Service

if TYPE_CHECKING:
    from lorakit.serve.server import Server

_WATCH_SECONDS = 0.5


def create_app(server: Server, keys: Keys | None = None, options: Options | None = None) -> FastAPI:
    """The HTTP application of a server, for uvicorn or any other ASGI server.

    Args:
        server: The engine and its adapters; started and closed with the application.
        keys: Who may ask; everyone by default.
        options: How it answers.
    """
    service = Service(server, keys, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        watching = asyncio.create_task(_keep_alive(service))
        try:
            yield
        finally:
            service.draining = True
            watching.cancel()
            await asyncio.to_thread(server.close)
            service.close()

    # The documentation pages that FastAPI brings would be loaded from the network: there are none.
    app = FastAPI(
        title="lorakit",
        version=lorakit.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for part in (chat, completions, adapters, lorax, health):
        app.include_router(part.router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    app.add_exception_handler(ServeError, errors.on_serve_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid_request)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_middleware(Gate, service=service, open_paths=add_page(app))
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, with the errors as they are: not its 422, but one body for all of them."""
    if app.openapi_schema is None:
        text = {"type": "string"}
        fields: dict[str, Any] = {"message": text, "type": text}
        fields |= {name: {"anyOf": [text, {"type": "null"}]} for name in ("param", "code")}
        error = {"type": "object", "properties": fields, "required": list(fields)}
        body = {"type": "object", "properties": {"error": error}, "required": ["error"]}
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        described.setdefault("components", {}).setdefault("schemas", {})["Error"] = body
        reference = {"schema": {"$ref": "#/components/schemas/Error"}}
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = {
                    "description": "An error.",
                    "content": {"application/json": reference},
                }
        app.openapi_schema = described
    return app.openapi_schema


async def _keep_alive(service: Service) -> None:
    """Start the engine again when its thread has died; what it had in hand has failed, with an answer for each."""
    server = service.server
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        if not server.engine.alive and not service.draining:
            log.error(
                "failed", extra={"facts": {"event": "engine_dead", "error": "starting the engine again"}}
            )
            try:
                await asyncio.to_thread(server.restart)
            except Exception as error:  # the watch goes on: the next attempt may succeed
                log.error("failed", exc_info=error, extra={"facts": {"event": "engine_restart_failed"}})
