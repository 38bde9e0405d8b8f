"""``lorakit kernels``: the compiled low-rank product."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _kernels() -> None:
    """Build the compiled low-rank product for this computer, or tell whether it is in use.

    It makes the forward and backward pass of an adapter on the CPU quicker. Everything works without it; switch it off
    with the environment variable LORAKIT_KERNELS=off.

    [bold]Examples[/bold]

        lorakit kernels build
        lorakit kernels status
    """


@app.command("build")
def build(
    force: Annotated[bool, typer.Option("--force", help="Build it again though it is there.")] = False,
) -> None:
    """Compile it with g++ (or $CXX) for this torch and processor; about half a minute, once.

    It goes into the cache of the user. When there is no compiler, or it fails, the reason is one line and the plain
    operations stay in use.

    [bold]Example[/bold]

        CXX=g++-13 lorakit kernels build --force
    """
    import sys

    from lorakit.cli.output import say
    from lorakit.ops.native.build import build as build_library

    sys.stderr.write("Compiling the low-rank product for this computer, unless it is there already ...\n")
    say(f"compiled: {build_library(force=force)}")


@app.command("status")
def status(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Tell which way the low-rank product goes on this computer's CPU."""
    from lorakit.cli.output import say, say_json
    from lorakit.ops.native.load import status as find_status

    found = find_status()
    if as_json:
        say_json({"state": found.state, "reason": found.reason, "folder": str(found.folder)})
        return
    say(f"low-rank product on the CPU: {found}")
    say(f"The library's place is {found.folder}.")
