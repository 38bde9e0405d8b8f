"""The strict reader of .safetensors files, and the writer, beside the format's own library."""

from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.errors import AdapterFileError
from lorakit.io import safetensors_file
from lorakit.io.safetensors_file import DTYPES, encode, load_metadata, load_tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(b"".join(bytes(chunk) for chunk in encode(tensors, metadata or {})))
    return path


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_both_ways(code: str, tmp_path: Path) -> None:
    tensor = random((3, 2), DTYPES[code])
    if code != "C64":  # known to newer versions of the library only
        assert torch.equal(
            load_file(write(tmp_path / "ours", {"a": tensor}))["a"].view(torch.uint8),
            tensor.view(torch.uint8),
        )
        save_file({"a": tensor}, tmp_path / "theirs")
        assert torch.equal(
            load_tensors(tmp_path / "theirs")[0]["a"].view(torch.uint8), tensor.view(torch.uint8)
        )
    read = load_tensors(write(tmp_path / "ours", {"a": tensor}))[0]["a"]
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
named = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda n: n != "__metadata__"),
    st.tuples(
        shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    named,
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
)
def test_round_trip_and_the_library_agrees(tmp_path: Path, spec: Any, metadata: dict[str, str]) -> None:
    tensors = {name: random(shape, dtype) for name, (shape, dtype) in spec.items()}
    path = write(tmp_path / "file.safetensors", tensors, metadata)
    ours, told = load_tensors(path)
    theirs = load_file(path)
    assert told == metadata == load_metadata(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (ours[name], theirs[name]):
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)


def test_a_tensor_that_is_not_aligned(tmp_path: Path) -> None:
    data = bytes([7]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = raw(tmp_path / "f", {"b": entry(0, 1, [1], "U8"), "a": entry(1, 9, [2])}, data)
    assert load_tensors(path)[0]["a"].tolist() == [1.5, -2.0]


def test_non_contiguous_and_shared_tensors_are_written_out(tmp_path: Path) -> None:
    base = torch.randn(4, 3)
    path = write(tmp_path / "f", {"a": base.mT, "b": base, "c": base[::2]})
    tensors = load_tensors(path)[0]
    assert torch.equal(tensors["a"], base.mT)
    assert torch.equal(tensors["c"], base[::2])
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["a", "b", "c"]


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f", {"a": torch.ones(1000)})
    tensors = load_tensors(path)[0]
    with path.open("r+b") as file:  # in place, as PEFT saves
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert tensors["a"].eq(1).all()


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(2).double()
    first = write(tmp_path / "1", {"a": a, "b": b}).read_bytes()
    assert write(tmp_path / "2", {"b": b, "a": a}).read_bytes() == first


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: (p.write_bytes(b""), p)[1], "0 bytes"),
    "seven bytes": (lambda p: (p.write_bytes(b"1234567"), p)[1], "7 bytes"),
    "no header": (lambda p: (p.write_bytes(bytes(8)), p)[1], "no header"),
    "huge header": (lambda p: (p.write_bytes(b"\xff" * 8 + b"{}"), p)[1], "header is said to be"),
    "header past the end": (lambda p: (p.write_bytes((99).to_bytes(8, "little") + b"{}"), p)[1], "99 bytes"),
    "git lfs pointer": (
        lambda p: (p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), p)[1],
        "Git LFS",
    ),
    "not json": (lambda p: raw(p, b"{oops}"), "not JSON"),
    "not utf-8": (lambda p: raw(p, b'{"\xff": 1}'), "not JSON"),
    "deep json": (lambda p: raw(p, b"[" * 100_000), "not JSON"),
    "a list": (lambda p: raw(p, []), "not a JSON object"),
    "metadata of numbers": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "metadata"),
    "a name twice": (
        lambda p: raw(
            p,
            b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        ),
        "'a' twice",
    ),
    "unknown dtype": (lambda p: raw(p, {"a": entry(0, 4, [1], "F31")}, bytes(4)), "unknown dtype 'F31'"),
    "dtype is a list": (
        lambda p: raw(p, {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "unknown dtype",
    ),
    "an entry lacks a field": (
        lambda p: raw(p, {"a": {"dtype": "F32", "shape": [1]}}),
        "'a' is not described",
    ),
    "an entry has more": (lambda p: raw(p, {"a": {**entry(0, 4), "x": 1}}, bytes(4)), "'a' is not described"),
    "negative size": (lambda p: raw(p, {"a": entry(0, 4, [-1])}, bytes(4)), r"shape \[-1\]"),
    "size true": (
        lambda p: raw(p, {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        "shape",
    ),
    "a float offset": (
        lambda p: raw(p, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)),
        "data_offsets",
    ),
    "size does not fit": (lambda p: raw(p, {"a": entry(0, 8, [3])}, bytes(8)), "needs 12 bytes, not 8"),
    "a size that overflows": (lambda p: raw(p, {"a": entry(0, 4, [2**62, 2**62])}, bytes(4)), "bytes, not 4"),
    "end before begin": (
        lambda p: raw(p, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, bytes(8)),
        "needs 4 bytes",
    ),
    "overlap": (lambda p: raw(p, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "gap": (lambda p: raw(p, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leaves 4 bytes"),
    "first not at 0": (lambda p: raw(p, {"a": entry(4, 8)}, bytes(8)), "leaves 4 bytes"),
    "cut off": (lambda p: raw(p, {"a": entry(0, 8)}, bytes(5)), "cut off"),
    "bytes left": (lambda p: raw(p, {"a": entry(0, 4)}, bytes(9)), "5 bytes at its end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told(kind: str, tmp_path: Path) -> None:
    make, message = DAMAGE[kind]
    path = make(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=message) as caught:
        load_tensors(path)
    assert "adapter_model.safetensors" in str(caught.value)
    assert "damaged" in str(caught.value) or "Git LFS" in str(caught.value)


def test_a_file_cut_anywhere_is_never_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "f", {"a": torch.randn(5), "b": torch.randn(2, 2)}, {"k": "v"}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(AdapterFileError):
            load_tensors(tmp_path / "cut")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_in_the_header_are_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(write(tmp_path / "f", {"a": torch.ones(4), "b": torch.zeros(2, 2)}).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "f").write_bytes(whole)
    try:
        tensors, _ = load_tensors(tmp_path / "f")
    except AdapterFileError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 32  # some other sound header


def test_a_header_longer_than_the_format_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "f", {"a": torch.ones(4)})
    monkeypatch.setattr(safetensors_file, "MOST_HEADER_BYTES", 10)
    with pytest.raises(AdapterFileError, match="header is said to be"):
        load_tensors(path)


def test_a_dtype_that_the_format_lacks() -> None:
    with pytest.raises(AdapterFileError, match="complex128"):
        list(encode({"a": torch.zeros(1, dtype=torch.complex128)}, {}))


def test_a_missing_file_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="cannot be read"):
        load_tensors(tmp_path / "none")


def test_a_large_file_is_read_whole_and_lies_in_one_memory(tmp_path: Path) -> None:
    made = {"a": torch.randn(700, 1000), "b": torch.randn(1000, 900)}
    save_file(made, tmp_path / "large")
    read, _ = load_tensors(tmp_path / "large")
    assert all(torch.equal(read[name], tensor) for name, tensor in made.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 1
    assert read["a"].untyped_storage().nbytes() == sum(tensor.nbytes for tensor in made.values())


def test_no_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "small")

    def refuse(*size: int, dtype: torch.dtype) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"12 bytes of .*small"):
        load_tensors(tmp_path / "small")


def test_a_large_file_lies_in_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"A": torch.randn(1 << 20), "B": torch.randn(3 << 18).bfloat16()}
    path = write(tmp_path / "large", large, {"format": "pt"})
    found = load_tensors(path)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in large.items())
    assert found["A"].untyped_storage().data_ptr() % mmap.PAGESIZE == 0  # a mapping of its own

    def refuse(*sizes: Any, **settings: Any) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=r"bytes of .*large"):
        load_tensors(path)
