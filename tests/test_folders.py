"""Replacing a folder: whatever moment the process is killed at, one of the two is there or comes back."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import folders
from lorakit.errors import ConfigError, ModelError
from lorakit.folders import exchange, hidden_beside, left_beside, put_back, put_in_place
from lorakit.models.cache import building, find_damage
from lorakit.models.new_folder import new_folder
from lorakit.models.resolve import resolve

SWAPS = [pytest.param(True, id="one step"), pytest.param(False, id="two steps")]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")


def folder(path: Path, word: str) -> Path:
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(word)
    return path


def word_in(path: Path) -> str:
    (word,) = {(path / name).read_text() for name in ("a", "b")}
    return word


def dies(action: Callable[[], object]) -> None:
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def killing(where: Any, name: str, call: int, *, after: bool = False) -> None:
    """Let the process be killed at the n-th call of a function, before it or after it."""
    kept, calls = getattr(where, name), []

    def dying(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = kept(*args, **options)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, dying)


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_two_folders_change_places(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "öther", "2")
    if not exchange(one, other):
        pytest.skip("the disk of the temporary folder cannot exchange names")
    assert (word_in(one), word_in(other)) == ("2", "1")
    assert not exchange(one, tmp_path / "nowhere")
    assert word_in(one) == "2"


@pytest.mark.parametrize("swaps", SWAPS)
@pytest.mark.parametrize("before", ["nothing", "empty", "folder", "file", "link"])
def test_what_was_there_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, before: str
) -> None:
    if not swaps:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    place, elsewhere = tmp_path / "place", folder(tmp_path / "elsewhere", "linked")
    if before == "empty":
        place.mkdir()
    elif before == "folder":
        folder(place, "old")
    elif before == "file":
        place.write_text("old")
    elif before == "link":
        place.symlink_to(elsewhere)
    put_in_place(folder(tmp_path / "new", "new"), place)
    assert word_in(place) == "new"
    assert word_in(elsewhere) == "linked"
    assert not place.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "place"]


def test_what_cannot_be_put_in_place_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    place = folder(tmp_path / "place", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", place)
    assert word_in(place) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


MOMENTS = {
    "before the exchange": (True, folders, "exchange", 1, False),
    "after the exchange": (True, folders, "exchange", 1, True),
    "while the old is removed": (True, os, "unlink", 1, True),
    "before the first rename": (False, Path, "rename", 1, False),
    "after the first rename": (False, Path, "rename", 1, True),
    "before the second rename": (False, Path, "rename", 2, False),
    "after the second rename": (False, Path, "rename", 2, True),
    "while the renamed is removed": (False, os, "unlink", 1, True),
}


@forks
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["helper", "merge"])
def test_a_kill_at_every_moment(tmp_path: Path, moment: str, how: str) -> None:
    swaps, where, name, call, after = MOMENTS[moment]
    place = folder(tmp_path / "place", "old")
    if swaps and not exchange(folder(tmp_path / "x", "x"), folder(tmp_path / "y", "y")):
        pytest.skip("the disk of the temporary folder cannot exchange names")
    for used in tmp_path.glob("[xy]"):
        shutil.rmtree(used)

    def replace() -> None:
        if not swaps:
            folders.exchange = lambda one, other: False
        if how == "helper":
            new = folder(hidden_beside(place, ".part"), "new")
            killing(where, name, call, after=after)
            put_in_place(new, place)
            return
        with new_folder(place, [], overwrite=True) as part:
            (part / "a").write_text("new")
            (part / "b").write_text("new")
            killing(where, name, call, after=after)

    dies(replace)
    gone = moment in ("after the first rename", "before the second rename")
    assert place.exists() == (not gone)
    put_back(place)
    assert word_in(place) == ("old" if gone or "before" in moment else "new")
    with new_folder(place, [], overwrite=True) as part:
        folder(part / "inner", "newer")
    assert word_in(place / "inner") == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def left(place: Path, host: str, pid: str) -> Path:
    return folder(place.parent / f".{place.name}.{host}-{pid}-00.old", "old")


def test_the_next_use_finds_the_old_folder(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("spawn").Process(target=print)
    dead.start()
    dead.join()
    place = tmp_path / "model"
    old = left(place, socket.gethostname(), str(dead.pid))
    (old / "config.json").write_text('{"model_type": "llama"}')
    assert left_beside(place, ".old") == [old]
    assert resolve(place).family == "llama"
    assert not old.exists()
    shutil.rmtree(place)
    left(place, socket.gethostname(), str(dead.pid))
    with pytest.raises(ConfigError, match="exists and is not empty"), new_folder(place, []):
        pass
    assert word_in(place) == "old"


def test_a_folder_of_another_machine_or_a_running_process_is_named(tmp_path: Path) -> None:
    place = tmp_path / "model"
    for host, pid in (("elsewhere", "1"), (socket.gethostname(), str(os.getpid()))):
        old = left(place, host, pid)
        with pytest.raises(ModelError, match=r"\.model\..*\.old"):
            resolve(place)
        assert old.exists()
        assert not place.exists()
        shutil.rmtree(old)


@forks
@pytest.mark.parametrize("swaps", SWAPS)
def test_a_damaged_folder_of_the_cache_is_replaced(tmp_path: Path, swaps: bool) -> None:
    place, source = tmp_path / "model", {"wheel": "1"}
    for word in ("first", "second"):
        with building(place, source) as work:
            (work / "model" / "a").write_text(word)
        assert (place / "a").read_text() == "first"
    (place / "a").write_text("damaged")

    def rebuild() -> None:
        if not swaps:
            folders.exchange = lambda one, other: False
            killing(Path, "rename", 1, after=True)
        else:
            killing(folders, "exchange", 1)
        with building(place, source) as work:
            (work / "model" / "a").write_text("third")

    dies(rebuild)
    with building(place, source) as work:
        (work / "model" / "a").write_text("third")
    assert find_damage(place, source) is None
    assert (place / "a").read_text() == "third"
