"""A whole server against a model of itself: any order of loads, names, requests, mixes, cancellations and crashes."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

import lorakit as lk
from lorakit.errors import (
    AdapterExistsError,
    EngineDeadError,
    InternalServeError,
    ModelNotFoundError,
    RequestAbortedError,
)
from lorakit.serve.requests import FinishEvent, GenerationRequest, TokenEvent
from lorakit.serve.sampling import Sampling
from lorakit.serve.server import Server, build_server
from lorakit.serve.stream import Stream
from lorakit.serve.versions import content_digest
from tests.serve.http_world import save_adapter
from tests.serve.store_world import until
from tests.serve.tiny_serving import alone
from tests.tiny_chat import tiny_model, tiny_tokenizer

NAMES, FOLDERS = ("n0", "n1", "n2"), ("f0", "f1", "f2", "f3")
PROMPTS = ([10, 50, 90, 7], [33] * 20, list(range(60, 130)))
LENGTH = 40
RARELY = st.integers(0, 7).map(lambda n: n == 7)


@dataclass
class Truth:
    """Adapter folders, made once, and what transformers says with each; None is the base."""

    folder: Path
    answers: dict[str | None, list[list[int]]]
    digests: dict[str, str]


def _truth() -> Truth:
    folder = Path(tempfile.mkdtemp(prefix="server-machine-"))
    answers: dict[str | None, list[list[int]]] = {None: _answers(tiny_model())}
    digests = {}
    for seed, name in enumerate(FOLDERS):
        model = tiny_model()
        lk.load(model, save_adapter(folder / name, lk.LoRA(r=2 + seed, alpha=8), seed=seed + 40))
        answers[name] = _answers(model)
        digests[name] = content_digest(lk.read(folder / name))
    return Truth(folder, answers, digests)


def _answers(model: Any) -> list[list[int]]:
    return [alone(model, None, prompt, LENGTH) for prompt in PROMPTS]


@dataclass(eq=False)
class Asked:
    """A request that runs, and what it must say."""

    stream: Stream
    expected: list[int]
    digests: frozenset[str]
    tokens: list[int] = field(default_factory=list)
    may_fail: set[type[Exception]] = field(default_factory=set)
    cancelled: bool = False

    def take(self, event: TokenEvent | FinishEvent | Any) -> None:
        """Every token is the one that transformers says, and an end is one that may be."""
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token_id)
            assert self.tokens == self.expected[: len(self.tokens)]
        elif isinstance(event, FinishEvent) and event.error is not None:
            assert type(event.error) in self.may_fail, repr(event.error)
        elif isinstance(event, FinishEvent):
            assert self.cancelled or (event.reason == "length" and self.tokens == self.expected)


class ServerMachine(RuleBasedStateMachine):
    """Names are given to folders by explicit loads; there is room for all (the store's own machine has less)."""

    running = Bundle("running")
    truth: Truth | None = None

    def __init__(self) -> None:
        super().__init__()
        if ServerMachine.truth is None:
            ServerMachine.truth = _truth()
        self.t = ServerMachine.truth
        self.root = Path(tempfile.mkdtemp(prefix="server-machine-root-"))
        for name in FOLDERS:
            shutil.copytree(self.t.folder / name, self.root / name)
        largest = max(lk.read(self.root / name).nbytes for name in FOLDERS)
        self.server: Server = build_server(
            tiny_model(), self.root, tokenizer=tiny_tokenizer(), name="base", runner="transformers", implicit=False,
            threads=1, kv_tokens=2048, adapter_bytes=40 * largest,
        )  # fmt: skip
        self.server.start()
        self.names: dict[str, str] = {}  # to its newest folder
        self.aliases: dict[str, str] = {}
        self.asked: list[Asked] = []

    @initialize()
    def fill(self) -> None:
        for name, folder in zip(NAMES, FOLDERS, strict=False):
            self.load(name, folder, replace=False)

    # ---- operators
    @rule(name=st.sampled_from(NAMES), folder=st.sampled_from(FOLDERS), replace=st.booleans())
    def load(self, name: str, folder: str, replace: bool) -> None:
        future = self.server.store.load(name, folder, if_exists="replace" if replace else "error")
        error = future.exception(20)
        if name in self.names and not replace:
            assert isinstance(error, AdapterExistsError)
        else:
            assert future.result().digest == self.t.digests[folder]
            self.names[name] = folder

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from(["prod", "test"]))
    def alias(self, name: str, alias: str) -> None:
        if name in self.names:
            self.server.store.alias(alias, name)
            self.aliases[alias] = self.names[name]

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.names and (not pinned or not any(e.pinned for e in self.server.store.list())):
            self.server.store.pin(name, pinned)

    @rule(name=st.sampled_from([*NAMES, "prod"]), force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        if name not in self.names and name not in self.aliases:
            assert isinstance(self.server.store.acquire(name).exception(20), ModelNotFoundError)
            return
        if force:
            for asked in self.asked:
                asked.may_fail.add(RequestAbortedError)
        self.server.unload(name, force=force)
        self.names.pop(name, None)
        self.aliases.pop(name, None)

    # ---- requests
    @rule(
        target=running,
        model=st.sampled_from([None, *NAMES, "prod"]),
        prompt=st.integers(0, len(PROMPTS) - 1),
        tokens=st.integers(1, LENGTH),
    )
    def ask(self, model: str | None, prompt: int, tokens: int) -> Any:
        lease, folder = None, None
        if model is not None:
            folder = self.names.get(model) or self.aliases.get(model)
            future = self.server.store.acquire(model, holder=uuid.uuid4().hex)
            if folder is None:
                assert isinstance(future.exception(20), ModelNotFoundError)
                return multiple()
            lease = future.result(20)
        digests = frozenset() if folder is None else frozenset([self.t.digests[folder]])
        return self._submit(lease, prompt, self.t.answers[folder][prompt][:tokens], digests)

    @rule(target=running, prompt=st.integers(0, len(PROMPTS) - 1), half=st.booleans())
    def ask_a_mix(self, prompt: int, half: bool) -> Any:
        """One adapter whole, named as a mix, says what it says; half of one what its halved factors say."""
        name = next(iter(self.names), None)
        if name is None:
            return multiple()
        folder, weight = self.names[name], 0.5 if half else 1.0
        expected = self._half(folder)[prompt] if half else self.t.answers[folder][prompt]
        future = self.server.store.mix({name: weight}, holder=uuid.uuid4().hex)
        return self._submit(future.result(20), prompt, expected[:10], frozenset([self.t.digests[folder]]))

    def _half(self, folder: str) -> list[list[int]]:
        key = f"{folder}/2"
        if key not in self.t.answers:
            model = tiny_model()
            state = lk.read(self.root / folder)
            for group in state.tensors.values():
                group["lora_B"] = group["lora_B"] / 2
            lk.attach(model, state, name="half")
            self.t.answers[key] = _answers(model)
        return self.t.answers[key]

    def _submit(self, lease: Any, prompt: int, expected: list[int], digests: frozenset[str]) -> Asked:
        request = GenerationRequest(
            list(PROMPTS[prompt]), lease, Sampling(temperature=0), max_tokens=len(expected), ignore_eos=True,
            **({} if lease is None else {"id": lease.holder}),
        )  # fmt: skip
        asked = Asked(self.server.engine.submit(request), expected, digests)
        self.asked.append(asked)
        return asked

    @rule(asked=running, events=st.integers(1, 5))
    def read_some(self, asked: Asked, events: int) -> None:
        for _ in range(events):
            event = asked.stream.get(20)
            if event is not None:
                asked.take(event)

    @rule(asked=consumes(running))
    def read_to_the_end(self, asked: Asked) -> None:
        while (event := asked.stream.get(20)) is not None:
            asked.take(event)
        self.asked.remove(asked)

    @rule(asked=consumes(running), cut=st.booleans())
    def cancel(self, asked: Asked, cut: bool) -> None:
        asked.cancelled = True
        asked.stream.cancel()
        if not cut:
            while (event := asked.stream.get(20)) is not None:
                asked.take(event)
        self.asked.remove(asked)

    @rule(name=st.sampled_from(NAMES))
    def ask_and_give_up_waiting(self, name: str) -> None:
        self.server.store.acquire(name).add_done_callback(
            lambda future: future.result().release() if future.exception() is None else None
        )

    @rule(really=RARELY)
    def crash(self, really: bool) -> None:
        """The engine's thread dies with all that it has in hand; another one takes its place."""
        if not really:
            return

        def broken() -> bool:
            raise RuntimeError("broken")

        engine = self.server.engine
        for asked in self.asked:
            asked.may_fail |= {EngineDeadError, InternalServeError}
        engine._cycle = broken  # type: ignore[method-assign]
        with engine._changed:
            engine._changed.notify_all()
        until(lambda: not engine.alive, 20)
        self.server.restart()

    # ---- what always holds
    @invariant()
    def the_names_are_as_told(self) -> None:
        listed = {entry.name: entry.digest for entry in self.server.store.list()}
        told = {**self.names, **self.aliases}
        assert listed == {name: self.t.digests[folder] for name, folder in told.items()}

    def teardown(self) -> None:
        try:
            for asked in self.asked:
                while (event := asked.stream.get(20)) is not None:
                    asked.take(event)
            engine, store = self.server.engine, self.server.store
            until(lambda: engine.state().running == engine.state().waiting == 0)
            until(lambda: store.stats().in_use == 0)
            assert self.server.runner.arena.used == 0
            for name in [*self.names, *self.aliases]:
                store.unload(name)
            until(lambda: store.stats().bytes == 0)
        finally:
            self.server.close()
            shutil.rmtree(self.root, ignore_errors=True)


TestServerMachine = ServerMachine.TestCase
TestServerMachine.settings = settings(
    max_examples=6,
    stateful_step_count=30,
    phases=[Phase.generate],  # a failure tells its steps; finding fewer of them would start many more servers
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
