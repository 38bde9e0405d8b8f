"""What ``lorakit serve`` says before it takes requests: the base, the adapters, the keys, and the address."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.output import say, size
from lorakit.errors import listing

if TYPE_CHECKING:
    from lorakit.serve.server import Server


def say_ready(url: str) -> None:
    """The last line, at once: who started the program may be waiting for it in a pipe."""
    say(f"serving   {url}/v1   (Ctrl-C stops)")
    sys.stdout.flush()


def base_lines(server: Server) -> list[str]:
    """What is served, and how."""
    arena = server.runner.arena
    return [
        f"base      {server.name}, {server.weights}, context {server.runner.context} tokens, room for {arena.capacity} "
        f"tokens ({size(arena.nbytes)})",
        f"runs on   {server.note}",
    ]


def adapter_lines(folder: Path | None, server: Server) -> list[str]:
    """Which adapters can be asked for."""
    names = [entry.name for entry in server.store.list()]
    if folder is None:
        return ["adapters  none; give their folder with --adapters"]
    if not names:
        return [f"adapters  none in {folder} yet; a folder that is put there can be asked for at once"]
    return [f"adapters  {len(names)} in {folder}: {listing(names, most=12)}"]


def key_lines(keys: Path | None, host: str) -> list[str]:
    """The keys file; without one a warning, unless ``host`` is this machine alone."""
    if keys is not None:
        return [f"keys      {keys}"]
    if host in ("127.0.0.1", "localhost", "::1"):
        return []
    return ["keys      none: everyone who can reach this address may use and manage the server (see --keys)"]
