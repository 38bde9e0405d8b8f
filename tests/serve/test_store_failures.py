"""The failures that belong to the adapter store, each provoked for real: what is answered, and that others go on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import (
    AdapterBaseMismatchError,
    AdapterCapacityError,
    AdapterCorruptError,
    AdapterExistsError,
    AdapterIncompatibleError,
    AdapterLoadTimeoutError,
    AdapterNotFoundError,
    InternalServeError,
    InvalidAdapterIdError,
    MemoryExhaustedError,
    ModelNotFoundError,
    ServeError,
    ShuttingDownError,
    UnsafeAdapterFormatError,
)
from lorakit.io.adapter_directory import CONFIG, PICKLE, WEIGHTS
from lorakit.serve import sources
from lorakit.serve.sources import Limits
from lorakit.serve.store import AdapterStore
from lorakit.serve.versions import AdapterVersion
from tests.serve.store_world import facts, new_store, same, until, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    write(folder / "good", 1)
    write(folder / "bad", 2)
    return folder


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with new_store(root, reserved=["tiny"]) as made:
        yield made
        with made.acquire("good").result(10) as lease:  # whatever happened, others are served
            assert lease.version.rank == 4
        assert made.stats().bytes == lease.version.bytes
        assert made.stats().loading == made.stats().waiting == 0


def failure(store: AdapterStore, name: str = "bad") -> ServeError:
    error = store.acquire(name).exception(10)
    assert isinstance(error, ServeError)
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}
    assert str(store.root) not in str(error), "a client need not know the server's folders"
    return error


def load_failure(store: AdapterStore, source: str = "bad", name: str = "new") -> ServeError:
    error = store.load(name, source).exception(10)
    assert isinstance(error, ServeError)
    assert str(store.root) not in str(error)
    assert name not in [entry.name for entry in store.list()]
    return error


# ---- 1: unknown
@pytest.mark.parametrize("name", ["nothing", "good@2", "good@7", "tiny", "nothing@1"])
def test_unknown_is_never_the_base(store: AdapterStore, name: str) -> None:
    error = failure(store, name)
    assert isinstance(error, ModelNotFoundError)
    assert (error.status, error.type, error.code, error.param) == (
        404, "not_found_error", "model_not_found", "model",
    )  # fmt: skip


def test_an_unknown_name_gets_a_hint(store: AdapterStore) -> None:
    assert "Did you mean 'good'" in str(failure(store, "goood"))


def test_without_implicit_loading_a_folder_is_unknown(root: Path) -> None:
    with new_store(root, implicit=False) as store:
        assert store.list() == []
        assert isinstance(failure(store, "good"), ModelNotFoundError)


# ---- 2: names that are paths
NASTY = [
    "../bad", "..", ".", "/etc/passwd", "a/b", "a\\b", "a\0b", "", " ", "-a", ".hidden", "a" * 129, "ä", "a b", "a@0",
    "a@", "a@-1", "a@1@2", "a@9999999999", "good\n", "%2e%2e", "a:b", "~", "a*",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_never_a_path(store: AdapterStore, name: str) -> None:
    for error in (failure(store, name), load_failure(store, "bad", name)):
        assert isinstance(error, InvalidAdapterIdError)
        assert (error.status, error.code) == (400, "invalid_adapter_id")
    for call in (store.unload, store.pin, store.entry, lambda bad: store.alias(bad, "good")):
        with pytest.raises(InvalidAdapterIdError):
            call(name)


@pytest.mark.parametrize("name", [None, 3, b"good", ["good"]])
def test_a_name_is_text(store: AdapterStore, name: object) -> None:
    assert isinstance(failure(store, name), InvalidAdapterIdError)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["../outside", "/etc", "bad/../../outside", "x\0y", "", "a" * 5000])
def test_a_source_stays_in_the_root(store: AdapterStore, root: Path, source: str) -> None:
    write(root.parent / "outside", 3)
    error = load_failure(store, source)
    assert isinstance(error, InvalidAdapterIdError)
    assert error.param == "source"


def test_python_may_load_from_anywhere(store: AdapterStore, root: Path) -> None:
    state = write(root.parent / "outside", 3)
    version = store.load("out", root.parent / "outside", anywhere=True).result(10)
    assert same(version.state, state)
    store.unload("out")
    until(lambda: store.stats().contents == 0)


def test_links_do_not_lead_out(store: AdapterStore, root: Path) -> None:
    write(root.parent / "outside", 3)
    (root / "link").symlink_to(root.parent / "outside")
    assert isinstance(failure(store, "link"), InvalidAdapterIdError)
    assert isinstance(load_failure(store, "link"), InvalidAdapterIdError)
    shutil.rmtree(root / "bad")
    (root / "bad").mkdir()
    for name in (CONFIG, WEIGHTS):
        (root / "bad" / name).symlink_to(root.parent / "outside" / name)
    error = failure(store)
    assert isinstance(error, InvalidAdapterIdError)
    assert "leads out" in str(error)
    assert error.param == "model"


def test_a_link_inside_the_root_is_fine(store: AdapterStore, root: Path) -> None:
    (root / "same").symlink_to(root / "good")
    with store.acquire("same").result(10) as lease, store.acquire("good").result(10) as other:
        assert lease.version is other.version


def test_a_pipe_is_not_waited_for(store: AdapterStore, root: Path) -> None:
    (root / "bad" / WEIGHTS).unlink()
    os.mkfifo(root / "bad" / WEIGHTS)
    assert isinstance(failure(store), AdapterNotFoundError)


# ---- 3: damaged
def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: object, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def bomb(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 100)


def long_header(path: Path) -> None:
    header, rest = header_of(path)
    with_header(path, json.dumps({**header, "__metadata__": {"x": "y" * 300_000}}).encode(), rest)


def many_dimensions(path: Path) -> None:
    header, rest = header_of(path)
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [2**62] * 20_000  # type: ignore[index]
    with_header(path, header, rest)


def many_digits(path: Path) -> None:
    with_header(path, b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}', b"0000")


def nested(path: Path) -> None:
    with_header(path, b'{"a":' * 50_000, b"")


def overlapping(path: Path) -> None:
    header, rest = header_of(path)
    for name in header:
        if name != "__metadata__":
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]  # type: ignore[index]
            header[name]["data_offsets"] = [0, size]  # type: ignore[index]
    with_header(path, header, rest)


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" * 3)


def change(path: Path, value: float) -> None:
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    next(iter(tensors.values())).view(-1)[3] = value
    with_metadata = header_of(path)[0].get("__metadata__")
    save_file(tensors, path, metadata=with_metadata)  # type: ignore[arg-type]


def not_a_number(path: Path) -> None:
    change(path, float("nan"))


def infinite(path: Path) -> None:
    change(path, float("inf"))


def bad_config(path: Path) -> None:
    (path.parent / CONFIG).write_text('{"peft_type": "LORA",')


def list_config(path: Path) -> None:
    (path.parent / CONFIG).write_text("[1]")


DAMAGE: list[Callable[[Path], None]] = [
    cut, empty, noise, bomb, long_header, many_dimensions, many_digits, nested, overlapping, lfs_pointer, not_a_number,
    infinite, bad_config, list_config,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root / "bad" / WEIGHTS)
    with new_store(root, limits=Limits(header_bytes=200_000)) as store:
        began = time.monotonic()
        error = failure(store)
        assert isinstance(error, AdapterCorruptError), error
        assert (error.status, error.code, error.param) == (424, "adapter_corrupt", "model")
        asked = load_failure(store)
        assert isinstance(asked, AdapterCorruptError)
        assert (asked.status, asked.type) == (400, "invalid_request_error")
        assert time.monotonic() - began < 5
        assert store.stats().bytes == 0
        store.acquire("good").result(10).release()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_bytes_are_answered(root: Path, data: st.DataObject) -> None:
    """Bytes flipped, cut or inserted anywhere: an adapter with these numbers, or one of three answers."""
    path = root / "bad" / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 300))]
            case _:
                content[at:at] = data.draw(st.binary(max_size=20))
        if not content:
            break
    path.write_bytes(content)
    try:
        with new_store(root) as store:
            error = store.acquire("bad").exception(20)
            assert error is None or isinstance(
                error,
                (
                    AdapterCorruptError,
                    AdapterIncompatibleError,
                    AdapterBaseMismatchError,
                    AdapterNotFoundError,
                ),
            ), repr(error)
            if error is not None:
                assert store.stats().bytes == 0
    finally:
        path.write_bytes(before)


def test_a_failure_is_remembered_until_the_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(root / "bad" / WEIGHTS)
    checked: list[str] = []
    check = sources.check_files
    monkeypatch.setattr(
        "lorakit.serve.finding.check_files", lambda f, limits: checked.append(f.path.name) or check(f, limits)
    )
    now = [100.0]
    with new_store(root, clock=lambda: now[0] + time.monotonic() % 0.001, remember_failures=30.0) as store:
        for _ in range(5):
            assert failure(store).code == "adapter_corrupt"
        assert checked == ["bad"]
        assert load_failure(store).code == "adapter_corrupt"  # an operator who asks is answered from the disk
        assert checked == ["bad", "bad"]
        now[0] += 40.0
        assert failure(store).code == "adapter_corrupt"
        assert checked == ["bad"] * 3
        write(root / "bad", 2)  # repaired: nobody has to wait
        store.acquire("bad").result(10).release()


# ---- 4: pickles
class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(Trap.sign),))

    sign: Path


@pytest.mark.parametrize("name", [PICKLE, "pytorch_model.bin", "adapter.pt", "adapter.ckpt"])
def test_a_pickle_is_never_opened(store: AdapterStore, root: Path, tmp_path: Path, name: str) -> None:
    Trap.sign = tmp_path / "opened"
    (root / "bad" / WEIGHTS).unlink()
    (root / "bad" / name).write_bytes(pickle.dumps(Trap()))
    for error in (failure(store), load_failure(store), load_failure(store, f"bad/{name}")):
        assert isinstance(error, UnsafeAdapterFormatError)
        assert (error.status, error.code) == (400, "unsafe_adapter_format")
        assert "lorakit convert" in str(error)
    assert not Trap.sign.exists()


def test_a_pickle_beside_sound_weights_is_not_touched(
    store: AdapterStore, root: Path, tmp_path: Path
) -> None:
    Trap.sign = tmp_path / "opened"
    (root / "bad" / PICKLE).write_bytes(pickle.dumps(Trap()))
    store.acquire("bad").result(10).release()
    assert not Trap.sign.exists()
    store.unload("bad")
    until(lambda: store.stats().contents == 0)


# ---- 5: another base
def test_another_width(store: AdapterStore, root: Path) -> None:
    write(root / "wide", 3, width=24)
    error = failure(store, "wide")
    assert isinstance(error, AdapterBaseMismatchError)
    assert (error.status, error.code) == (409, "adapter_base_mismatch")
    assert "32 x 16" in str(error)


def test_nothing_in_common(store: AdapterStore, root: Path) -> None:
    other = torch.nn.ModuleDict({"encoder": torch.nn.Linear(16, 32)})
    lk.attach(other, lk.LoRA(r=2), ["encoder"])
    lk.save(other, root / "other")
    assert isinstance(failure(store, "other"), AdapterBaseMismatchError)


def test_a_deeper_base(store: AdapterStore, root: Path) -> None:
    write(root / "deep", 3, layers=4)
    error = failure(store, "deep")
    assert isinstance(error, AdapterIncompatibleError)
    assert "layers.2.up" in str(error)


def as_peft_alone(folder: Path, **changes: str) -> None:
    """Leave of an adapter what PEFT itself would have written, with changes in the configuration."""
    header, rest = header_of(folder / WEIGHTS)
    del header["__metadata__"]
    with_header(folder / WEIGHTS, header, rest)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_the_name_of_the_base_does_not_matter(store: AdapterStore, root: Path) -> None:
    as_peft_alone(root / "bad", base_model_name_or_path="/somewhere/else/entirely")
    store.acquire("bad").result(10).release()
    store.unload("bad")
    until(lambda: store.stats().contents == 0)


# ---- 6: cannot be served
def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=header_of(path)[0].get("__metadata__"))  # type: ignore[arg-type]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.7.up.lora_A.weight"] = torch.zeros(4, 16)


def lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if "lora_B" in key)]


def other_rank(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = torch.zeros(5, tensors[key].shape[1])


@pytest.mark.parametrize("edit", [extra, lacking, other_rank], ids=lambda edit: edit.__name__)
def test_every_tensor_has_its_place(
    store: AdapterStore, root: Path, edit: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    edit_tensors(root / "bad" / WEIGHTS, edit)
    for error in (failure(store), load_failure(store)):
        assert isinstance(error, AdapterIncompatibleError)
        assert (error.status, error.code) == (400, "adapter_incompatible")
        assert "lora_" in str(error)


def test_limits(root: Path) -> None:
    write(root / "big", 3, lk.LoRA(r=12))
    with new_store(root, limits=Limits(rank=8, tensor_bytes=5000)) as store:
        assert "5000" in str(failure(store, "big"))
    with new_store(root, limits=Limits(rank=8)) as store:
        error = failure(store, "big")
        assert isinstance(error, AdapterIncompatibleError)
        assert "layers.0.up (12)" in str(error)
        store.acquire("good").result(10).release()
    with new_store(root, max_bytes=100) as store:
        error = failure(store, "good")
        assert isinstance(error, AdapterIncompatibleError)
        assert "more than there are" in str(error)


def test_a_type_that_is_not_known(store: AdapterStore, root: Path) -> None:
    as_peft_alone(root / "bad", peft_type="HIRA")
    assert isinstance(failure(store), AdapterIncompatibleError)


def test_what_the_runner_refuses(root: Path) -> None:
    def refuse(version: AdapterVersion) -> None:
        if version.name == "bad":
            raise AdapterIncompatibleError("layers.0.up cannot be run here")

    freed: list[str] = []
    with new_store(root, prepare=refuse, on_free=lambda v: freed.append(v.name)) as store:
        assert "layers.0.up" in str(failure(store))
        assert store.stats().bytes == 0
        store.acquire("good").result(10).release()
        assert freed == [], "what was not prepared is not freed"


@pytest.mark.parametrize(
    ("raised", "answer", "status"),
    [(RuntimeError("cuda"), InternalServeError, 500), (MemoryError(), MemoryExhaustedError, 503)],
)
def test_a_runner_that_fails(root: Path, raised: Exception, answer: type[ServeError], status: int) -> None:
    broken = [True]

    def prepare(version: AdapterVersion) -> None:
        if broken[0]:
            raise raised

    with new_store(root, prepare=prepare) as store:
        error = failure(store, "good")
        assert type(error) is answer
        assert error.status == status
        assert "cuda" not in str(error)
        assert store.stats().bytes == 0
        broken[0] = False
        store.acquire("good").result(10).release()


# ---- 7: not there
def test_missing_files(store: AdapterStore, root: Path) -> None:
    (root / "bad" / WEIGHTS).unlink()
    for error in (failure(store), load_failure(store), load_failure(store, "nowhere")):
        assert isinstance(error, AdapterNotFoundError)
        assert (error.status, error.code) == (404, "adapter_not_found")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(store: AdapterStore, root: Path) -> None:
    (root / "bad" / WEIGHTS).chmod(0)
    assert isinstance(failure(store), AdapterNotFoundError)


def test_several_in_one_folder(store: AdapterStore, root: Path) -> None:
    write(root / "many" / "one", 3)
    state = write(root / "nest" / "only", 4)
    write(root / "many" / "two", 4)
    error = load_failure(store, "many")
    assert isinstance(error, AdapterNotFoundError)
    assert "one, two" in str(error)
    assert same(store.load("two", "many/two").result(10).state, state)
    with store.acquire("two").result(10) as lease:
        assert lease.version is store.load("nest", "nest").result(10)
    for name in ("two", "nest"):
        store.unload(name)
    until(lambda: store.stats().contents == 0)


# ---- 9: the name is taken
def test_names_are_not_taken_twice(store: AdapterStore) -> None:
    store.load("mine", "bad").result(10)
    store.alias("also", "mine")
    for name in ("mine", "also", "tiny"):
        error = store.load(name, "good").exception(10)
        assert isinstance(error, AdapterExistsError)
        assert (error.status, error.code) == (409, "adapter_exists")
    assert isinstance(store.load("tiny", "good", if_exists="replace").exception(10), AdapterExistsError)
    for name in ("mine", "tiny"):
        with pytest.raises(AdapterExistsError):
            store.alias(name, "also")
    store.unload("mine")
    store.unload("also")
    until(lambda: store.stats().contents == 0)


# ---- 12: slow
def test_a_load_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    find = sources.find_files

    def hang(path: Path, within: Path | None) -> object:
        if path.name == "bad":
            go.wait(20)
        return find(path, within)

    monkeypatch.setattr("lorakit.serve.finding.find_files", hang)
    with new_store(root, threads=1, load_timeout=0.15) as store:
        waiting = [store.acquire("bad") for _ in range(3)]
        for future in waiting:
            error = future.exception(10)
            assert isinstance(error, AdapterLoadTimeoutError)
            assert (error.status, error.code) == (504, "adapter_load_timeout")
        assert store.acquire("good").result(10).version.name == "good", "the only thread still hangs"
        began = time.monotonic()
        assert failure(store).code == "adapter_load_timeout"
        assert time.monotonic() - began < 0.1, "not tried again so soon"
        go.set()
        until(lambda: store.stats().loading == 0)
        assert store.load("bad2", "bad").result(10).name == "bad2"


def test_a_late_preparation_is_undone(root: Path) -> None:
    go = threading.Event()
    freed: list[AdapterVersion] = []
    with new_store(root, load_timeout=0.15, prepare=lambda v: go.wait(20), on_free=freed.append) as store:
        assert failure(store).code == "adapter_load_timeout"
        assert store.stats().bytes > 0, "the thread still has it in its hands"
        go.set()
        until(lambda: store.stats().bytes == 0)
        until(lambda: [version.name for version in freed] == ["bad"])


# ---- 13: no room
def test_no_room(root: Path) -> None:
    write(root / "third", 3)
    with new_store(root, max_bytes=2 * 3072 + 100, capacity_wait=0.2) as store:
        leases = [store.acquire(name).result(10) for name in ("good", "bad")]
        began = time.monotonic()
        error = failure(store, "third")
        assert isinstance(error, AdapterCapacityError)
        assert (error.status, error.code) == (503, "adapter_capacity")
        assert error.retry_after is not None
        assert 0.15 < time.monotonic() - began < 5
        leases[0].release()
        with store.acquire("third").result(10):
            pass
        leases[1].release()


def test_all_pinned(root: Path) -> None:
    with new_store(root, max_bytes=3072 + 100, capacity_wait=0.1) as store:
        store.load("kept", "good", pinned=True).result(10)
        assert isinstance(failure(store), AdapterCapacityError)
        store.pin("kept", False)
        store.acquire("bad").result(10).release()


def test_room_that_comes_free_is_given_at_once(root: Path) -> None:
    with new_store(root, max_bytes=3072 + 100, capacity_wait=20.0) as store:
        lease = store.acquire("good").result(10)
        waiting = store.acquire("bad")
        until(lambda: store.stats().waiting == 1)
        assert not waiting.done()
        lease.release()
        waiting.result(5).release()


# ---- 20, 23: the end
def test_closing_fails_what_waits(root: Path) -> None:
    store = new_store(root, max_bytes=3072 + 100, capacity_wait=20.0)
    lease = store.acquire("good").result(10)
    waiting = [store.acquire("bad"), store.load("third", "bad")]
    until(lambda: store.stats().waiting == 1)
    store.close()
    for future in (*waiting, store.acquire("good"), store.load("x", "bad"), store.mix({"good": 0.5})):
        assert isinstance(future.exception(5), ShuttingDownError)
    assert lease.version.rank == 4
    lease.release()


def test_no_shape_is_compared_where_none_is_known() -> None:
    assert facts().layers["layers.0.up"] == Shape("linear", out=32, in_=16)
