"""The cache's folders appear whole or not at all, and damage is found."""

from __future__ import annotations

import os
import threading

import pytest

from lorakit.models.cache import (
    MANIFEST,
    building,
    exclusive,
    find_damage,
    remove_leftovers,
    write_manifest,
)

SOURCE = {"wheel": "tiny-1.0.whl"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(9 * 1024**2)  # above the size that the quick check hashes
    write_manifest(folder, SOURCE)
    return folder


def test_a_whole_folder_has_no_damage(folder):
    assert find_damage(folder, SOURCE) is None
    assert find_damage(folder, SOURCE, full=True) is None


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_missing_file_is_damage(folder, name):
    (folder / name).unlink()
    assert find_damage(folder, SOURCE) == f"{name} is missing"


def test_a_truncated_weight_file_is_damage(folder):
    os.truncate(folder / "model.safetensors", 100)
    assert "100 bytes" in find_damage(folder, SOURCE)


def test_a_small_file_changed_at_the_same_size_is_damage(folder):
    (folder / "config.json").write_text("[]")
    assert find_damage(folder, SOURCE) == "the content of config.json has changed"


def test_a_large_file_changed_at_the_same_size_is_found_by_the_full_check(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"x")
    assert find_damage(folder, SOURCE) is None
    assert find_damage(folder, SOURCE, full=True) == "the content of model.safetensors has changed"


def test_another_source_is_damage(folder):
    assert find_damage(folder, {"wheel": "tiny-2.0.whl"}) == "it was made from something else"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"source": {}, "files": 3}', '{"source": {}, "files": {"a": {}}}']
)
def test_an_unreadable_manifest_is_damage(folder, text):
    (folder / MANIFEST).write_text(text)
    assert "cannot be read" in find_damage(folder, SOURCE)


def test_no_folder_is_damage(tmp_path):
    assert find_damage(tmp_path / "none", SOURCE) is not None


def test_building_shows_the_folder_only_when_complete(tmp_path):
    target = tmp_path / "models" / "tiny"
    with building(target, SOURCE) as work:
        (work / "download.whl").write_text("thrown away")
        (work / "model" / "config.json").write_text("{}")
        assert not target.exists()
    assert find_damage(target, SOURCE, full=True) is None
    assert sorted(path.name for path in target.iterdir()) == ["config.json", MANIFEST]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_a_failed_building_leaves_nothing(tmp_path, interruption):
    target = tmp_path / "models" / "tiny"

    def build() -> None:
        with building(target, SOURCE) as work:
            (work / "model" / "config.json").write_text("{}")
            raise interruption

    with pytest.raises(interruption):
        build()
    assert list(target.parent.iterdir()) == []


def test_a_failed_building_keeps_the_folder_that_was_there(folder):
    with pytest.raises(ValueError, match="broke"), building(folder, SOURCE):
        raise ValueError("broke")
    assert find_damage(folder, SOURCE, full=True) is None


def test_building_replaces_a_damaged_folder(folder):
    (folder / "config.json").unlink()
    with building(folder, SOURCE) as work:
        (work / "model" / "new.json").write_text("{}")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "new.json"]
    assert list(folder.parent.iterdir()) == [folder]


def test_of_two_builders_at_once_the_first_to_finish_stays(tmp_path):
    target = tmp_path / "tiny"
    with building(target, SOURCE) as slow:
        (slow / "model" / "who").write_text("slow")
        with building(target, SOURCE) as fast:
            (fast / "model" / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert find_damage(target, SOURCE) is None
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    target = tmp_path / "tiny"
    (tmp_path / ".building-tiny-abc" / "model").mkdir(parents=True)
    (tmp_path / ".building-other-abc").mkdir()
    remove_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == [".building-other-abc"]


def test_only_one_is_inside_an_exclusive_block(tmp_path):
    inside, most, waited, guard = 0, 0, [], threading.Lock()

    def enter(name: int) -> None:
        nonlocal inside, most
        with exclusive(tmp_path / "lock", on_wait=lambda: waited.append(name)) as held:
            assert held
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.05)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=enter, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == 1
    assert len(waited) == len(set(waited)) == 2
