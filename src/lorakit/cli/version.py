"""``lorakit version``."""

from __future__ import annotations

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Print the versions of lorakit and of what its numbers depend on, and whether its compiled kernels are used."""
    from lorakit.cli.output import say, say_json
    from lorakit.ops.native.load import status
    from lorakit.train.run_files import versions

    found = versions() | {"kernels": str(status())}
    if as_json:
        say_json(found)
        return
    for name in sorted(found, key=lambda n: n != "lorakit"):
        say(f"{name} {found[name]}")
