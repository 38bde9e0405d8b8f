"""Every failure as one body, `{"error": {"message", "type", "param", "code"}}`; a traceback goes to the log alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lorakit.errors import InternalServeError, InvalidRequestError, MemoryExhaustedError, ServeError
from lorakit.serve.api.record import RequestRecord, log

_PLACES = ("body", "query", "path")
_TAGS = {"str", "int", "float", "bool", "dict"}
_HTTP = {
    404: ("not_found_error", "unknown_url"),
    405: ("invalid_request_error", "method_not_allowed"),
}


def as_serve_error(error: BaseException, record: RequestRecord | None = None) -> ServeError:
    """What to tell a client about an exception: itself if it was made for clients, else only that it happened."""
    if isinstance(error, ServeError):
        return error
    log.error("failed", exc_info=error, extra={"facts": _facts(error, record)})
    if isinstance(error, MemoryError):
        return MemoryExhaustedError("The server had not enough memory for this request; try again later.")
    return InternalServeError(
        "Something went wrong in the server; it is in its log" + (f" as {record.id}." if record else ".")
    )


def error_response(error: ServeError, record: RequestRecord | None = None) -> Response:
    """The answer that tells an error."""
    if record is not None:
        record.error = error.code
    return _response(error.status, error.body(), error.retry_after, error.code)


def error_text(error: ServeError) -> str:
    """The body as one line, for a stream that has begun."""
    return json.dumps(error.body())


async def on_serve_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of `ServeError`."""
    assert isinstance(error, ServeError)
    return error_response(error, request.scope["state"].get("record"))


async def on_invalid_request(request: Request, error: Exception) -> Response:
    """FastAPI's handler of what pydantic found."""
    assert isinstance(error, RequestValidationError)
    return error_response(invalid(error.errors()), request.scope["state"].get("record"))


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of an unknown path, a wrong method and the like."""
    assert isinstance(error, HTTPException)
    kind, code = _HTTP.get(error.status_code, ("invalid_request_error", "invalid_request"))
    what = f"{request.method} {request.url.path[:200]}"
    message = {
        404: f"There is nothing at {what}.",
        405: f"{what} is not possible; this path takes other methods.",
    }.get(error.status_code, f"{what}: {error.detail}")
    record = request.scope["state"].get("record")
    if record is not None:
        record.error = code
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    response = _response(error.status_code, body, None, code)
    response.headers.update(error.headers or {})
    return response


def invalid(found: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """All that is wrong with a body, named by its fields, and none of its values repeated at length."""
    faults: dict[str, list[str]] = {}
    for fault in found:
        name = "" if fault["type"] == "json_invalid" else _field(fault["loc"])
        wording = _wording(name, fault)
        if wording not in faults.setdefault(
            name, []
        ):  # a field of several kinds has a fault for each of them
            faults[name].append(wording)
    names = list(faults)
    message = " ".join(" Or: ".join(faults[name][:3]) for name in names[:5])
    if len(names) > 5:
        message += f" ({len(names) - 5} more fields are wrong.)"
    return InvalidRequestError(message, param=names[0] or None)


def _field(place: Sequence[str | int]) -> str:
    """`messages.0.role`; what pydantic adds to it, such as the types of a union, is left out."""
    parts: list[str] = []
    for part in place[1:] if place and place[0] in _PLACES else place:
        tag = isinstance(part, str) and (part in _TAGS or not part.replace("_", "").isalnum())
        if tag and parts:
            break
        parts.append(str(part)[:100])
    return ".".join(parts)


def _wording(name: str, fault: Mapping[str, Any]) -> str:
    kind, message = fault["type"], str(fault["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"The body is not JSON: {fault.get('ctx', {}).get('error', message)}."
    if kind == "extra_forbidden":
        return f"Unknown field {name!r}."
    if kind == "missing":
        return f"The field {name!r} is missing." if name else "The body is missing."
    if kind == "none_required":
        return f"The field {name!r} is not supported by this server."
    return f"{name!r}: {message}." if name else f"{message}."


def _response(status: int, body: dict[str, Any], retry_after: float | None, code: str) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    if code == "invalid_api_key":
        headers["WWW-Authenticate"] = "Bearer"
    if status == 408:  # what of the body still comes would be taken for the next request
        headers["Connection"] = "close"
    # A message may repeat a lone surrogate of the request; JSON escapes it, UTF-8 could not.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def _facts(error: BaseException, record: RequestRecord | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"event": "error", "error": f"{type(error).__name__}: {error}"}
    if record is not None:
        facts["request_id"] = record.id
    return facts
