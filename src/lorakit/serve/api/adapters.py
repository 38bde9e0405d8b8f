"""The models that can be asked, and the adapters: list, load, unload, pin, alias; vLLM's two endpoints for the same."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorakit.errors import AdapterExistsError, InvalidRequestError, ModelNotFoundError
from lorakit.serve.api.auth import Tenant
from lorakit.serve.api.schemas.adapters import AliasAdapter, LoadAdapter, PinAdapter, VllmLoad, VllmUnload
from lorakit.serve.api.service import Service
from lorakit.serve.entries import AdapterEntry, UnloadReport
from lorakit.serve.versions import parse_id

router = APIRouter()


def _service(request: Request) -> tuple[Service, Tenant]:
    return request.app.state.service, request.scope["state"]["record"].tenant


def _managed(request: Request) -> tuple[Service, Tenant]:
    """The same for who may manage adapters."""
    service, tenant = _service(request)
    tenant.require_admin()
    return service, tenant


# ---- models
@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base and every adapter that the key may use."""
    service, tenant = _service(request)
    models = [_base(service), *(_model(service, entry) for entry in service.entries(tenant))]
    return JSONResponse({"object": "list", "data": models})


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    """One of them."""
    service, tenant = _service(request)
    if name == service.server.name:
        return JSONResponse(_base(service))
    return JSONResponse(_model(service, _entry(service, tenant, name)))


def _base(service: Service) -> dict[str, Any]:
    server = service.server
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "lorakit",
        "root": server.name,
        "parent": None,
        "digest": server.digest,
        "max_model_len": server.runner.context,
    }


def _model(service: Service, entry: AdapterEntry) -> dict[str, Any]:
    own = {"id": entry.name, "root": entry.alias_of or entry.name, "digest": entry.digest}
    return {**_base(service), **own, "parent": service.server.name}


# ---- adapters
@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter that the key may use, with what is known of it."""
    service, tenant = _service(request)
    entries = [describe(service, tenant, entry) for entry in service.entries(tenant)]
    return JSONResponse({"object": "list", "data": entries})


@router.get("/v1/adapters/{name:path}")
async def show_adapter(request: Request, name: str) -> Response:
    """One adapter."""
    service, tenant = _service(request)
    return JSONResponse(describe(service, tenant, _entry(service, tenant, name)))


@router.post("/v1/adapters", status_code=201)
async def load_adapter(request: Request, asked: LoadAdapter) -> Response:
    """Read an adapter from the server's adapter folder into memory."""
    service, tenant = _managed(request)
    await _load(service, asked.name, asked.source or asked.name, asked.pinned, asked.if_exists)
    return JSONResponse(describe(service, tenant, service.server.store.entry(asked.name)), 201)


@router.delete("/v1/adapters/{name:path}")
async def unload_adapter(request: Request, name: str, force: bool = False) -> Response:
    """Take an adapter's name away at once; its memory is freed when the last request that uses it is done."""
    service, _ = _managed(request)
    _only(request, "force")
    report = _unload(service, name, force=force)
    return JSONResponse(
        {"id": name, "object": "adapter.unloaded", "status": report.status, "in_flight": report.in_flight}
    )


@router.post("/v1/adapters/{name:path}/pin")
async def pin_adapter(request: Request, name: str, asked: PinAdapter | None = None) -> Response:
    """Keep an adapter in memory whatever happens, or no longer."""
    service, tenant = _managed(request)
    pinned = asked.pinned if asked is not None else True
    entry = service.server.store.pin(str(parse_id(name, param="name")), pinned)
    return JSONResponse(describe(service, tenant, entry))


@router.post("/v1/adapters/{name:path}/alias", status_code=201)
async def alias_adapter(request: Request, name: str, asked: AliasAdapter) -> Response:
    """Give what a name means now a further name, which stays with that version."""
    service, tenant = _managed(request)
    entry = service.server.store.alias(asked.alias, str(parse_id(name, param="name")))
    return JSONResponse(describe(service, tenant, entry), 201)


# ---- the same, as vLLM's users write it
@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, asked: VllmLoad) -> Response:
    """VLLM's way to load an adapter; the path is one in the server's adapter folder."""
    service, _ = _managed(request)
    await _load(
        service, asked.lora_name, asked.lora_path, False, "replace" if asked.load_inplace else "error"
    )
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, asked: VllmUnload) -> Response:
    """VLLM's way to unload one."""
    service, _ = _managed(request)
    _unload(service, asked.lora_name, force=False)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def describe(service: Service, tenant: Tenant, entry: AdapterEntry) -> dict[str, Any]:
    """An adapter as JSON, as a tenant may see it."""
    return {
        "id": entry.name,
        "object": "adapter",
        "version": entry.version,
        "versions": list(entry.versions),
        "alias_of": entry.alias_of,
        "digest": entry.digest,
        "tier": entry.tier,
        "bytes": entry.bytes,
        "rank": entry.rank,
        "targets": entry.targets,
        "methods": list(entry.methods),
        "pinned": entry.pinned,
        "in_flight": entry.in_use,
        "hits": entry.uses,
        "loads": entry.loads,
        "idle_seconds": entry.idle_seconds,
        "base": entry.base,
        "source": _source(service, tenant, entry),
    }


def _source(service: Service, tenant: Tenant, entry: AdapterEntry) -> str | None:
    """Where an adapter was read from, as `source` of a load names it; other paths of the machine are for admins."""
    root, source = service.server.store.root, entry.source
    if source is None:
        return None
    path = Path(os.path.realpath(source))
    if root is not None and path.is_relative_to(os.path.realpath(root)):
        return str(path.relative_to(os.path.realpath(root)))
    return source if tenant.admin else None


def _entry(service: Service, tenant: Tenant, name: str) -> AdapterEntry:
    wanted = service.wanted(name, tenant)
    if wanted.name is None:
        raise ModelNotFoundError(f"{name[:200]!r} is no single adapter.")
    return service.server.store.entry(wanted.name)


async def _load(service: Service, name: str, source: str, pinned: bool, if_exists: str) -> None:
    if name == service.server.name:
        raise AdapterExistsError(
            f"{name!r} is the base model's name; give the adapter another one.", param="name"
        )
    future = service.server.store.load(
        name, source, pinned=pinned, if_exists="replace" if if_exists == "replace" else "error"
    )
    # A client that goes away does not undo a load that others may be waiting for.
    await asyncio.shield(asyncio.wrap_future(future))


def _unload(service: Service, name: str, *, force: bool) -> UnloadReport:
    return service.server.unload(str(parse_id(name, param="name")), force=force)


def _only(request: Request, *known: str) -> None:
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        raise InvalidRequestError(f"Unknown field {unknown[0][:100]!r}.", param=unknown[0][:100])
