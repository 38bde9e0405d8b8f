"""``lorakit serve``: one base model and many adapters over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorakit.serve.native_model import Storage
    from lorakit.serve.runners import RunnerKind


def command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="A folder, a built-in name (smollm2), or a hub id (org/name).")],
    adapters: Annotated[
        Path | None, typer.Option("--adapters", "-a", help="Folder whose sub-folders are adapters.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 is everywhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the base; its own name by default.")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="JSON file of API keys; see the guide.")] = None,
    weights: Annotated[
        str,
        typer.Option("--weights", "-w", help="fp32, or int8: quicker and smaller, and not quite the same."),
    ] = "fp32",
    runner: Annotated[
        str,
        typer.Option("--runner", help="auto, native (compiled) or transformers (the model's own layers)."),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of a step; torch's number by default.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of an answer when a request names no number.")
    ] = 256,
    kv_tokens: Annotated[
        int, typer.Option("--kv-tokens", min=64, help="Room for all running requests together, in tokens.")
    ] = 16_384,
    running: Annotated[int, typer.Option("--running", min=1, help="Most answers at a time.")] = 32,
    step_tokens: Annotated[int, typer.Option("--step-tokens", min=2, help="Tokens of one step.")] = 128,
    prefix_cache: Annotated[
        int, typer.Option("--prefix-cache", min=0, help="MB for beginnings of prompts; 0 keeps none.")
    ] = 0,
    adapter_memory: Annotated[
        int, typer.Option("--adapter-memory", min=1, help="MB for adapters in memory.")
    ] = 1024,
    preload: Annotated[
        list[str] | None, typer.Option("--preload", help="Load this adapter at the start and keep it.")
    ] = None,
    trusted: Annotated[
        Path | None, typer.Option("--trusted", help="File of public keys; only adapters signed by one load.")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests-per-minute", min=0.001, help="Most requests of one tenant.")
    ] = None,
    in_flight: Annotated[
        int, typer.Option("--in-flight", min=1, help="Most requests at a time; one more is refused.")
    ] = 512,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Largest request body, in kB.")] = 4096,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.001, help="Longest wait of a request for its turn, in s."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds to complete answers after SIGTERM.")
    ] = 30.0,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Processes with a copy of the base each; see the guide.")
    ] = 1,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log; they are left out otherwise.")
    ] = False,
) -> None:
    r"""Serve one base model with any number of adapters, over OpenAI's API.

    A request's "model" names an adapter, a version of it, a mix of several, or the base; requests for different
    adapters run in the same steps. Adapters in the folder are read when they are first asked for.

    [bold]Examples[/bold]

        lorakit serve smollm2 --adapters runs/
        lorakit serve ./base -a ./adapters --host 0.0.0.0 --keys keys.json --weights int8
        lorakit serve ./base -a ./adapters --replicas 2
        curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \
            -d '{"model": "sql", "messages": [{"role": "user", "content": "How many singers are there?"}]}'

    SIGTERM and Ctrl-C finish the answers in hand first. The log is one line of JSON a request, on standard error.
    """
    from typing import cast

    from lorakit.cli.output import quiet_loading, say
    from lorakit.cli.serve_lines import adapter_lines, base_lines, key_lines, say_ready
    from lorakit.errors import ConfigError, MissingDependencyError

    try:
        from lorakit.serve.api.auth import Keys
        from lorakit.serve.api.limits import Limits
        from lorakit.serve.api.service import Options
        from lorakit.serve.http import bind, serve_http
    except ImportError as error:
        raise MissingDependencyError(
            f"Serving needs {error.name}, which is not installed. Install it with: pip install 'lorakit[serve]'"
        ) from error

    if adapters is not None and not adapters.is_dir():
        raise ConfigError(f"There is no folder {adapters} of adapters.")
    if preload and adapters is None:
        raise ConfigError("--preload names adapters of a folder: give --adapters too.")
    known = Keys() if keys is None else Keys.from_file(keys)
    options = Options(
        max_tokens=max_tokens,
        timeout=timeout,
        log_prompts=log_prompts,
        limits=Limits(
            in_flight=in_flight, requests_per_minute=requests_per_minute, body_bytes=max_body * 1024
        ),
    )
    if replicas > 1:
        from lorakit.cli.serve_replicas import serve_several

        serve_several(context, bind(host, port), replicas, keys=keys, limits=options.limits, grace=grace)
        return
    # Not before: a router has no need of these.
    from lorakit.serve.manifest import TrustedKeys
    from lorakit.serve.scheduler import EngineLimits
    from lorakit.serve.server import build_server

    with bind(host, port) as address:  # before the model is loaded for nothing
        quiet_loading()
        server = build_server(
            base,
            adapters,
            name=name,
            weights=cast("Storage", weights),
            runner=cast("RunnerKind", runner),
            threads=threads,
            kv_tokens=kv_tokens,
            limits=EngineLimits(
                running=running, step_tokens=step_tokens, prefix_cache_bytes=prefix_cache * 1024**2
            ),
            adapter_bytes=adapter_memory * 1024**2,
            trusted=None if trusted is None else TrustedKeys.read(trusted),
        )
        for adapter in preload or []:
            server.store.load(adapter, adapter, pinned=True).result()
        for line in [*base_lines(server), *adapter_lines(adapters, server), *key_lines(keys, host)]:
            say(line)
        serve_http(server, address, keys=known, options=options, grace=grace, ready=say_ready)
