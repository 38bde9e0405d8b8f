"""Putting a server together: a base model, its runner, the engine, the adapters; with HTTP around it or without."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import (
    ConfigError,
    DataError,
    RequestAbortedError,
)
from lorakit.models import load_model, load_tokenizer, resolve
from lorakit.models.conversation import stop_ids
from lorakit.serve.base_facts import base_facts, digest_of_weights
from lorakit.serve.engine import Engine
from lorakit.serve.entries import UnloadReport
from lorakit.serve.native_model import Storage
from lorakit.serve.rendering import Renderers
from lorakit.serve.runners import RunnerKind, make_runner
from lorakit.serve.scheduler import EngineLimits
from lorakit.serve.sources import Limits as AdapterLimits
from lorakit.serve.store import AdapterStore
from lorakit.serve.versions import AdapterVersion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.serve.manifest import TrustedKeys
    from lorakit.serve.runner import ModelRunner


class Server:
    """A base model, the engine that runs it, and the adapters that it runs with; `build_server` makes one.

    Attributes:
        name: What clients call the base model.
        tokenizer: The base's.
        renderers: Make prompts of conversations.
        runner: Computes the steps.
        engine: Makes answers.
        store: Holds the adapters.
        stop_ids: Tokens that end an answer.
        special_ids: Tokens that are no text.
        digest: SHA-256 over the base's weight files; None if it did not come from a folder.
        created: When, in seconds since 1970.
        weights: How the runner keeps the base's weights.
        note: Which runner it is and why, and what rounding the weights costs; for a person.
        limits: How much the engine does at once.
        restarts: Engines that were put in the place of dead ones.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        runner: ModelRunner,
        store: AdapterStore,
        *,
        stop_ids: Sequence[int],
        limits: EngineLimits | None = None,
        digest: str | None = None,
        weights: Storage = "fp32",
        note: str = "",
    ) -> None:
        self.name, self.tokenizer, self.runner, self.store = name, tokenizer, runner, store
        self.renderers = Renderers(tokenizer)
        self.stop_ids = tuple(stop_ids)
        self.special_ids = frozenset(int(token) for token in tokenizer.all_special_ids)
        self.digest, self.weights, self.note = digest, weights, note
        self.created = int(time.time())
        self.limits = limits or EngineLimits()
        self.restarts = 0
        self.engine = self._new_engine()
        self._started = False

    def _new_engine(self) -> Engine:
        base = self.digest or self.name
        return Engine(self.runner, self.tokenizer, limits=self.limits, end_tokens=self.stop_ids, base=base)

    def start(self) -> None:
        """Start the engine's thread; a second call does nothing."""
        if not self._started:
            self._started = True
            self.engine.start()

    def restart(self) -> None:
        """Put a new engine in the place of one whose thread has died; the model and the adapters are kept."""
        self.engine.stop()
        self.restarts += 1
        self.engine = self._new_engine()
        self.engine.start()

    def close(self) -> None:
        """Stop the engine and let go of the adapters; what is still running is ended."""
        if self._started:
            self.engine.stop()
        self.store.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fingerprint(self, digest: str | None) -> str:
        """What tells two answers of different weights apart: parts of the base's digest and of the adapter's."""
        return f"fp_{(self.digest or 'base')[:8]}_{(digest or 'base')[:8]}"

    def unload(self, name: str, *, force: bool = False) -> UnloadReport:
        """Take an adapter's name away, and with ``force`` end the requests that use it.

        Raises:
            ServeError: There is no such adapter.
        """
        report = self.store.unload(name, force=force)
        error = RequestAbortedError(f"The adapter {name!r} was unloaded by force while this request used it.")
        for lease in report.abort:
            if lease.holder is not None:
                self.engine.abort(lease.holder, error)
        return report

    def state(self) -> dict[str, Any]:
        """What the engine and the store are doing, as data for JSON."""
        now = self.engine.state()
        engine = asdict(now)
        for key in ("running_adapters", "waiting_adapters"):
            engine[key] = {self.name if name is None else name: n for name, n in engine[key].items()}
        engine["last_step"] = now.last_step._asdict()
        engine["prefix"] = None if now.prefix is None else now.prefix._asdict()
        return {
            "model": self.name,
            "digest": self.digest,
            "weights": self.weights,
            "alive": self.engine.alive,
            "engine": engine,
            "adapters": asdict(self.store.stats()),
        }


def build_server(
    base: str | Path | PreTrainedModel,
    adapters: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    weights: Storage = "fp32",
    runner: RunnerKind = "auto",
    threads: int | None = None,
    kv_tokens: int = 16_384,
    context: int | None = None,
    limits: EngineLimits | None = None,
    adapter_bytes: int = 1 << 30,
    max_rank: int | None = None,
    implicit: bool = True,
    trusted: TrustedKeys | None = None,
    load_timeout: float = 30.0,
    capacity_wait: float = 10.0,
) -> Server:
    """Load a base model and make a server of it, ready to be started.

    Args:
        base: A folder, a built-in name, a hub id, or a causal language model with its ``tokenizer``. The server owns
            the model from then on.
        adapters: The folder whose sub-folders are adapters; None for a server to which adapters are given by hand.
        tokenizer: Of a model that is given itself.
        name: What clients call the base; by default the last part of its name.
        weights: ``"fp32"``, or ``"int8"`` for weights that are rounded once and need a quarter of the memory.
        runner: ``"native"`` is the compiled step, ``"transformers"`` the model's own layers; ``"auto"`` takes the
            first where it is there and runs this model.
        threads: Threads of a step; by default torch's.
        kv_tokens: Room for keys and values, in tokens, of all running requests together.
        context: The most tokens of one request; by default what model and room allow.
        limits: How much the engine does at once.
        adapter_bytes: Memory for adapters.
        max_rank: The largest rank that is served; None for any.
        implicit: Whether a request may name an adapter of the folder that has not been loaded yet.
        trusted: Keys of which one must have signed every adapter.
        load_timeout: Seconds for each step of reading an adapter.
        capacity_wait: Seconds that a request waits for room for its adapter.

    Raises:
        ModelError: The base cannot be found, or cannot be served; the message says why.
        ConfigError: Options that make no sense together.
        KernelError: ``runner="native"``, and the compiled step is not there.
    """
    import torch

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1; got {threads}.")
        torch.set_num_threads(threads)
    digest = None
    if isinstance(base, (str, Path)):
        resolved = resolve(base)
        model, tokenizer = load_model(resolved), tokenizer or load_tokenizer(resolved)
        digest = None if resolved.path is None else digest_of_weights(resolved.path)
        name = name or (resolved.path.name if resolved.kind == "folder" and resolved.path else resolved.name)
    else:
        if tokenizer is None:
            raise ConfigError(
                "A model that is given itself needs its tokenizer: build_server(model, tokenizer=...)."
            )
        model, name = base, name or "base"
    # The facts are taken first: the compiled runner lets go of the model's own weights.
    facts = base_facts(model, digest=digest, name=name)
    ends = _end_tokens(model, tokenizer)
    running, note = make_runner(
        model, tokenizer, kind=runner, weights=weights, kv_tokens=kv_tokens, context=context, threads=threads
    )
    store = AdapterStore(
        None if adapters is None else Path(adapters),
        facts,
        max_bytes=adapter_bytes,
        implicit=implicit,
        reserved=[name],
        limits=AdapterLimits() if max_rank is None else AdapterLimits(rank=max_rank),
        trusted=trusted,
        prepare=lambda version: prepared.prepare(version),
        on_free=lambda version: prepared.free(version),
        load_timeout=load_timeout,
        capacity_wait=capacity_wait,
    )
    server = Server(
        name,
        tokenizer,
        running,
        store,
        stop_ids=ends,
        limits=limits,
        digest=digest,
        weights=weights,
        note=note,
    )
    prepared = _Preparations(server)
    return server


class _Preparations:
    """Counts who needs what the runner prepared: a content that is read again may be ready before the old one goes."""

    def __init__(self, server: Server) -> None:
        self._server, self._lock = server, threading.Lock()
        self._needed: Counter[str] = Counter()

    def prepare(self, version: AdapterVersion) -> None:
        with self._lock:
            self._needed[version.digest] += 1
        try:
            self._server.runner.prepare(version)
            self._server.renderers.note(version)
        except BaseException:
            self.free(version)
            raise

    def free(self, version: AdapterVersion) -> None:
        with self._lock:
            self._needed[version.digest] -= 1
            if self._needed[version.digest] <= 0:
                del self._needed[version.digest]
                self._server.engine.forget(version)
                self._server.renderers.forget(version)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return stop_ids(model, tokenizer)
    except DataError:  # a template that training could not use; the makers' own tokens are left
        found = {tokenizer.eos_token_id}
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found |= set(own) if isinstance(own, list) else {own}
        return sorted(token for token in found if token is not None)
