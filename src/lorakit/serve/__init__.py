"""Serving: many adapters over one base model, requests for different adapters in one step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.serve.multi_task import MultiTaskLoRAServer
    from lorakit.serve.server import Server, build_server

__all__ = ["MultiTaskLoRAServer", "Server", "build_server"]

_HOMES = {
    "MultiTaskLoRAServer": "lorakit.serve.multi_task",
    "Server": "lorakit.serve.server",
    "build_server": "lorakit.serve.server",
}


def __getattr__(name: str) -> Any:
    # Brought in when first used: the adapter store's own parts do not need a server's.
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit.serve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
