"""What is known of a request while it is answered, and the one line of the log that it leaves."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from lorakit.serve.api.auth import ANYONE, Tenant

log = logging.getLogger("lorakit.serve")

CLIENT_GONE = 499
"""The status in the log of a request whose client went away before the answer began."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: str | None) -> str:
    """The client's own `X-Request-Id` if it is a plain short word, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


@dataclass
class RequestRecord:
    """One request.

    Attributes:
        id: Also in the answer's header `X-Request-Id`.
        method: Of HTTP.
        path: Without the query.
        client: The client's address.
        tenant: Whose key it carried.
        status: Of the answer; `CLIENT_GONE` if nobody was left to get one.
        model: What was asked for.
        adapter: The name and version that answered; None for the base.
        digest: That version's.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        first_token: Seconds until the first one.
        queued: Seconds until the engine took it up.
        finish: Why each answer ended.
        error: The code of the error that was sent.
        prompt: The prompt, only if prompts are to be logged.
    """

    id: str
    method: str
    path: str
    client: str | None = None
    tenant: Tenant = ANYONE
    status: int | None = None
    model: str | None = None
    adapter: str | None = None
    digest: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None
    queued: float | None = None
    finish: list[str] = field(default_factory=list)
    error: str | None = None
    prompt: Any = None
    started: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.started

    def write(self) -> None:
        """The log's line, as JSON; what does not apply is left out."""
        facts = {
            "event": "request",
            "request_id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "client": self.client,
            "tenant": self.tenant.name,
            "model": self.model,
            "adapter": self.adapter,
            "digest": self.digest and self.digest[:12],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queued_ms": _milliseconds(self.queued),
            "first_token_ms": _milliseconds(self.first_token),
            "duration_ms": _milliseconds(self.age),
            "finish": self.finish or None,
            "error": self.error,
            "prompt": self.prompt,
        }
        log.info(
            "request", extra={"facts": {key: value for key, value in facts.items() if value is not None}}
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


class JsonLines(logging.Formatter):
    """Every message is one line of JSON; a traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        time_of = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time_of, "level": record.levelname.lower()}
        facts = getattr(record, "facts", None)
        line.update(facts if facts is not None else {"event": record.getMessage()})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write the server's log as JSON lines to standard error; what the host program set up is left alone."""
    if log.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
