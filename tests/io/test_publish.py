"""A full disk or a kill at any moment of a save leaves the old adapter or the new one, never a mix."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io import adapter_directory, publish, read, write
from lorakit.methods import LoRA
from tests.io.states import assert_equal

STEPS = (
    "create weights",
    "fill weights",
    "create config",
    "fill config",
    "sync before",
    "rename weights",
    "rename config",
    "sync after",
)


def adapter(r: int, *, native: bool = False) -> AdapterState:
    """An adapter whose every number, and rank, and alpha, tells which one it is."""
    shape = Shape("conv", 4, 6, (2,), (1,)) if native else Shape("linear", 4, 6)
    method = LoRA(r=r, alpha=float(r * 10))
    spec = AdapterSpec({"a.fc": method}, {"a.fc": shape}, base=f"base-{r}")
    return AdapterState(spec, {"a.fc": {n: torch.full(s, float(r)) for n, s in method.shapes(shape).items()}})


class FailingDisk(publish.Disk):
    """Fails, or runs something, at one step of a save."""

    def __init__(self, step: str, fail: Any = None) -> None:
        self.step, self.syncs, self.fail = step, 0, fail or self._full

    @staticmethod
    def _full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def at(self, step: str) -> None:
        if step == self.step:
            self.fail()

    def write(self, path: Path, chunks: Iterable[Any]) -> None:
        what = "weights" if "safetensors" in path.name else "config"
        self.at(f"create {what}")

        def some() -> Iterable[Any]:
            for chunk in chunks:
                yield memoryview(bytes(chunk))[: len(chunk) // 2]
                self.at(f"fill {what}")
                yield memoryview(bytes(chunk))[len(chunk) // 2 :]

        super().write(path, some())

    def rename(self, old: Path, new: Path) -> None:
        self.at("rename weights" if "safetensors" in new.name else "rename config")
        super().rename(old, new)

    def sync(self, directory: Path) -> None:
        self.syncs += 1
        self.at("sync before" if self.syncs == 1 else "sync after")
        super().sync(directory)


def which(directory: Path) -> int:
    """The adapter that is there, whole."""
    state = read(directory)
    r = state.spec.methods["a.fc"].r
    assert_equal(state, adapter(r, native=bool(state.spec.shapes["a.fc"].batch)))
    return r


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk(step: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(adapter(1), tmp_path)
    monkeypatch.setattr(publish, "DISK", FailingDisk(step))
    with pytest.raises(AdapterFileError, match="No space left") as caught:
        write(adapter(2, native=native), tmp_path)
    done = step in ("rename config", "sync after")
    assert which(tmp_path) == (2 if done else 1)
    assert ("untouched" in str(caught.value)) != done
    if step != "rename config":
        assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(publish, "DISK", publish.Disk())
    write(adapter(3), tmp_path)
    assert which(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_at_the_first_save(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "DISK", FailingDisk(step))
    with pytest.raises(AdapterFileError, match="No space left"):
        write(adapter(2), tmp_path / "new")
    if step in ("rename config", "sync after"):
        assert which(tmp_path / "new") == 2
    else:
        with pytest.raises(AdapterFileError, match="holds no adapter"):
            read(tmp_path / "new")


def _save_and_die(directory: Path, step: str) -> None:
    publish.DISK = FailingDisk(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    write(adapter(2), directory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step(step: str, tmp_path: Path) -> None:
    write(adapter(1), tmp_path)
    child = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(tmp_path, step))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert which(tmp_path) == (2 if step in ("rename config", "sync after") else 1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before  # reading changes nothing
    write(adapter(3), tmp_path)
    assert which(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_interrupted_save_is_finished_before_the_next_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(adapter(1), tmp_path)
    monkeypatch.setattr(publish, "DISK", FailingDisk("rename config"))
    with pytest.raises(AdapterFileError):
        write(adapter(2), tmp_path)
    monkeypatch.setattr(publish, "DISK", FailingDisk("create weights"))
    with pytest.raises(AdapterFileError):
        write(adapter(3), tmp_path)
    assert which(tmp_path) == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert not list(tmp_path.glob(".*"))


def _save_for_ever(directory: Path, started: Any) -> None:
    write(adapter(1), directory)
    started.set()
    for r in range(10**9):
        write(adapter(r % 4 + 1), directory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_kills_at_any_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for n in range(25):
        started = context.Event()
        child = context.Process(target=_save_for_ever, args=(tmp_path, started))
        child.start()
        assert started.wait(60)
        time.sleep(n * 0.0007)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert which(tmp_path) in (1, 2, 3, 4)
    write(adapter(1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def save(r: int) -> None:
        try:
            for _ in range(20):
                write(adapter(r), tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(r,)) for r in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert which(tmp_path) in (1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_reading_while_another_saves(tmp_path: Path) -> None:
    write(adapter(1), tmp_path)
    done = threading.Event()

    def save() -> None:
        for n in range(150):
            write(adapter(n % 4 + 1), tmp_path)
        done.set()

    thread = threading.Thread(target=save)
    thread.start()
    seen = set()
    while not done.is_set():
        seen.add(which(tmp_path))
    thread.join()
    assert len(seen) > 1


def test_a_save_that_slips_in_between_the_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(adapter(1), tmp_path)
    load, saves = adapter_directory._load, iter([2])

    def load_and_save(weights: Path) -> Any:
        loaded = load(weights)
        for r in saves:
            write(adapter(r), tmp_path)
        return loaded

    monkeypatch.setattr(adapter_directory, "_load", load_and_save)
    assert which(tmp_path) == 2


def test_the_files_of_a_living_writer_are_left(tmp_path: Path) -> None:
    write(adapter(1), tmp_path)
    host = publish.socket.gethostname()
    alive = tmp_path / f".adapter_config.json.{host}-{os.getppid()}-00000000.tmp"
    elsewhere = tmp_path / ".adapter_config.json.another-host-1-00000000.tmp"
    old = tmp_path / ".adapter_model.safetensors.another-host-2-00000000.tmp"
    for path in (alive, elsewhere, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    write(adapter(2), tmp_path)
    assert alive.exists()
    assert elsewhere.exists()
    assert not old.exists()
    assert which(tmp_path) == 2


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFileError, match="cannot be made a directory"):
        write(adapter(1), tmp_path / "file" / "below")
    with pytest.raises(AdapterFileError, match="cannot be made a directory"):
        write(adapter(1), tmp_path / "file")
