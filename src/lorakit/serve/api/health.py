"""Whether the server lives, whether it can take requests, what it is doing, and its numbers for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from lorakit.serve.api.service import Service

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """200 as long as the process answers at all: an orchestrator restarts it otherwise."""
    return JSONResponse({"status": "live"})


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 when requests are taken; 503 while the engine is down or the server is about to stop."""
    service: Service = request.app.state.service
    service.check_open()
    return JSONResponse({"status": "ready", "model": service.server.name})


@router.get("/v1/state")
async def state(request: Request) -> Response:
    """What the engine and the adapter store are doing at this moment."""
    service: Service = request.app.state.service
    request.scope["state"]["record"].tenant.require_admin()
    body: dict[str, Any] = {
        **service.server.state(),
        "draining": service.draining,
        "http_in_flight": service.admission.in_flight,
    }
    return JSONResponse(body)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format. With API keys, one that is marked as admin is needed: adapters' names are in it."""
    service: Service = request.app.state.service
    request.scope["state"]["record"].tenant.require_admin()
    text = await run_in_threadpool(generate_latest, service.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
