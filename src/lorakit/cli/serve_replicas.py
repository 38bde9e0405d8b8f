"""``lorakit serve --replicas N``: several server processes with the same options, and a router in front of them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorakit.errors import MissingDependencyError

if TYPE_CHECKING:
    from lorakit.serve.api.limits import Limits

_OF_THE_ROUTER = {"replicas", "host", "port", "keys", "base"}


def serve_several(
    context: typer.Context,
    address: socket.socket,
    number: int,
    *,
    keys: Path | None,
    limits: Limits,
    grace: float,
) -> None:
    """Serve with several processes until a signal.

    Args:
        context: The command line, which the replicas get too.
        address: Where the router listens.
        number: How many replicas.
        keys: The keys file.
        limits: What is let in, at all of them together.
        grace: Seconds for what is in hand when the end begins.
    """
    try:
        from lorakit.serve.router.http import serve_replicas
    except ImportError as error:
        raise MissingDependencyError(
            f"Replicas need {error.name}, which is not installed. Install it with: pip install 'lorakit[serve]'"
        ) from error
    from lorakit.cli.output import say
    from lorakit.cli.serve_lines import key_lines, say_ready

    def started(lines: Iterable[str]) -> None:
        for line in lines:
            # The replicas are closed to the outside; the address that counts for this warning is the router's.
            say(f"keys      {keys}" if line.startswith("keys ") else line)
        if keys is None:
            for line in key_lines(None, address.getsockname()[0]):
                say(line)
        say(f"replicas  {number}, each with its own copy of the base")

    serve_replicas(
        _command(context, number),
        number,
        address,
        keys=keys,
        limits=limits,
        grace=grace,
        started=started,
        ready=say_ready,
    )


def _command(context: typer.Context, number: int) -> list[str]:
    """The command of one replica: what was asked for, but at a free port that only this machine reaches."""
    given = dict(context.params)
    if given["threads"] is None:
        given["threads"] = max(1, (os.cpu_count() or 1) // number)
    words = [sys.executable, "-m", "lorakit.cli.replica", "serve", str(given["base"])]
    words += ["--host", "127.0.0.1", "--port", "0"]
    for option in context.command.params:
        value = given.get(option.name or "")
        if option.name in _OF_THE_ROUTER or value is None or value is False:
            continue
        if value is True:
            words.append(option.opts[0])
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [option.opts[0], str(one)]
    return words
