"""Many tasks from Python, without HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import ConfigError, ContextLengthError, ModelNotFoundError
from lorakit.serve import MultiTaskLoRAServer
from lorakit.serve.sampling import Sampling
from tests.serve.http_world import save_world
from tests.tiny_chat import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[MultiTaskLoRAServer]:
    with MultiTaskLoRAServer(folder / "tiny", threads=1, kv_tokens=4096) as made:
        made.load_task("sql", folder / "adapters" / "sql")
        made.load_task("style", folder / "adapters" / "style")
        yield made


def test_switching(server: MultiTaskLoRAServer, folder: Path) -> None:
    server.switch_task(None)
    base = server.generate("hello", max_tokens=10)
    server.switch_task("sql")
    sql = server.generate("hello", max_tokens=10)
    server.switch_task("third", folder / "adapters" / "acme-secret")
    third = server.generate("hello", max_tokens=10)
    assert len({base, sql, third}) == 3
    assert server.generate("hello", task="sql", max_tokens=10) == sql
    assert server.generate("hello", task="tiny", max_tokens=10) == base
    assert server.generate([{"role": "user", "content": "hello"}], max_tokens=10) == third
    assert "".join(server.stream("hello", task="sql", max_tokens=10)) == sql


def test_a_mixed_batch_says_what_each_would_say_alone(server: MultiTaskLoRAServer) -> None:
    asked = [(f"{i} hello", task) for i in range(4) for task in (None, "sql", "style")]
    server.switch_task(None)
    alone = [server.generate(text, task=task, max_tokens=12) for text, task in asked]
    assert server.generate_batch(asked, max_tokens=12) == alone


def test_from_many_threads(server: MultiTaskLoRAServer) -> None:
    alone = {task: server.generate("hi", task=task, max_tokens=12) for task in ("sql", "style")}
    found: list[tuple[str, str]] = []

    def ask(task: str) -> None:
        found.append((task, server.generate("hi", task=task, max_tokens=12)))

    threads = [threading.Thread(target=ask, args=(task,)) for task in ("sql", "style") * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([(task, alone[task]) for task in ("sql", "style") * 6])


def test_drawing_and_stops(server: MultiTaskLoRAServer) -> None:
    drawn = [
        server.generate("hi", task="sql", sampling=Sampling(temperature=1.5, seed=seed), max_tokens=12)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = server.generate("hi", task="style", max_tokens=20)
    stop = next(c for c in whole if c != "\ufffd")
    assert server.generate("hi", task="style", max_tokens=20, stop=[stop]) == whole[: whole.index(stop)]


def test_mistakes(server: MultiTaskLoRAServer, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        server.switch_task("nope")
    with pytest.raises(ModelNotFoundError):
        server.generate("hi", task="nope")
    with pytest.raises(ContextLengthError):
        server.generate("x" * 2000)
    with pytest.raises(ConfigError):
        server.switch_task(None, folder)
    assert server.server.store.stats().in_use == 0


def test_a_model_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        MultiTaskLoRAServer(tiny_model())
    with MultiTaskLoRAServer(tiny_model(), tokenizer=tiny_tokenizer(), kv_tokens=1024) as server:
        assert server.server.name == "base"
        assert len(server.generate("hello", max_tokens=5)) > 0
