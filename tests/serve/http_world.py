"""A real server for tests: a tiny chat model, real adapter folders, uvicorn on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

import lorakit as lk
from lorakit.serve.api.auth import Keys
from lorakit.serve.api.service import Options, Service
from lorakit.serve.http import HttpThread
from lorakit.serve.server import Server, build_server
from tests.tiny_chat import save_tiny_chat, tiny_model

BASE = "tiny"


def save_adapter(
    folder: Path, method: Any | None = None, *, seed: int = 0, scale: float = 0.3, **changes: Any
) -> Path:
    """An adapter with random numbers that change what the tiny model says."""
    model = tiny_model(**changes)
    lk.attach(model, method or lk.LoRA(r=4, alpha=8), targets="all-linear", name="a")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    lk.save(model, folder, name="a")
    return folder


def save_world(folder: Path) -> Path:
    """A base in ``tiny`` and the adapters ``sql``, ``style`` and ``acme-secret`` in ``adapters``."""
    save_tiny_chat(folder / BASE)
    save_adapter(folder / "adapters" / "sql", seed=1)
    save_adapter(folder / "adapters" / "style", lk.LoRA(r=8, alpha=8), seed=2)
    save_adapter(folder / "adapters" / "acme-secret", seed=3)
    return folder


@dataclass
class World:
    """A running server, and ways to ask it."""

    folder: Path
    url: str
    server: Server
    service: Service

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def ask(self, model: str, text: str = "hello", **more: Any) -> str:
        """The text of a greedy chat answer."""
        answer = self.post("/v1/chat/completions", chat(model, text, **more))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def idle(self) -> None:
        """Wait until nothing is in hand."""
        until(lambda: self.server.engine.state().running == 0 and self.server.engine.state().waiting == 0)
        until(lambda: self.service.admission.in_flight == 0)


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 12,
        **more,
    }


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def error_of(answer: httpx.Response) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and param; checks that the body is the one form that errors have."""
    body = answer.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]
    error = body["error"]
    return answer.status_code, error["type"], error["code"], error["param"]


class Running:
    """`with Running(folder) as world:` starts a server on a free port and stops it."""

    def __init__(
        self,
        folder: Path,
        *,
        keys: Keys | None = None,
        options: Options | None = None,
        grace: float = 5.0,
        **build: Any,
    ) -> None:
        self.folder, self.keys, self.options, self.grace = folder, keys, options, grace
        self.build = {"name": BASE, "threads": 1, "kv_tokens": 8192, **build}

    def __enter__(self) -> World:
        server = build_server(self.folder / BASE, self.folder / "adapters", **self.build)
        self.http = HttpThread(server, keys=self.keys, options=self.options, grace=self.grace)
        self.http.start()
        return World(self.folder, self.http.url, server, self.http.service)

    def __exit__(self, *exception: object) -> None:
        self.http.stop()
        assert not [t for t in threading.enumerate() if t is self.http.thread]
