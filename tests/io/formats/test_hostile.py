"""Hostile and damaged files: a clear error, never another exception, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.errors import AdapterFileError
from lorakit.io.formats import FORMATS, Hints, convert, read_any, write_as
from lorakit.io.publish import DISK

STEM = "lora_te_text_model_encoder_layers_0_mlp_fc1"
PATH = "unet.down_blocks.0.attn1.to_q"
keys = st.sampled_from(
    [
        *(f"{STEM}.{rest}" for rest in (
            "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b",
            "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
            "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff")),
        *(f"{PATH}.{rest}" for rest in ("lora_A.weight", "lora_B.weight", "lora.down.weight", "lora.up.weight",
                                        "alpha", "lora_magnitude_vector")),
        "unet:0:up", "unet:0:down", "unet:999999:up", "text_encoder:0:up", "text_encoder:0:down", "<s1>",
        "layer.lora_A", "layer.lora_B", "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b", "", ".", "x",
    ]
)  # fmt: skip
tensors = st.dictionaries(
    keys,
    st.tuples(
        st.lists(st.integers(0, 6), max_size=5),
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
    ),
    min_size=1,
    max_size=8,
)
texts = st.sampled_from(
    [
        "",
        "[",
        "null",
        "3",
        '["CLIPAttention"]',
        "<embed>",
        "lora",
        '{"a": {"path": 1, "size": 2}}',
        "nan",
        "4",
    ]
)
metadata = st.dictionaries(
    st.sampled_from(["lora_adapter_metadata", "lorakit.targets", "unet", "text_encoder", "unet:0:rank", "<s1>",
                     "adapter.type", "general.architecture", "adapter.lora.alpha", "lorakit.head_count"]),
    texts | st.just("llama"),
    max_size=4,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tensors, metadata, st.sampled_from(list(FORMATS)))
@example({"": ([], torch.float32)}, {}, "loralib")
def test_any_keys_and_sizes(
    described: dict[str, tuple[list[int], torch.dtype]], said: dict[str, str], name: str
) -> None:
    made = {key: torch.ones(size).to(dtype) for key, (size, dtype) in described.items()}
    try:
        state = FORMATS[name].read(made, said, Hints(alpha=1.0))
    except AdapterFileError:
        return
    assert all(path and group for path, group in state.tensors.items())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_byte_of_a_file(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file(
            {f"{STEM}.lora_down.weight": torch.ones(1, 768), f"{STEM}.lora_up.weight": torch.ones(3072, 1)},
            path,
        )
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), header, 8, 4, 0]))])
        with contextlib.suppress(AdapterFileError):
            read_any(path)


def _safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("second", "message"),
    [([0, 4], "overlaps"), ([6, 10], "unused before it"), ([4, 8], "cut off"), ([4, 2**62], "bytes")],
)
def test_offsets(tmp_path: Path, second: list[int], message: str) -> None:
    header = {
        "unet:0:up": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "unet:0:down": {"dtype": "F32", "shape": [1], "data_offsets": second},
    }
    with pytest.raises(AdapterFileError, match=message):
        read_any(_safetensors(tmp_path / "a.safetensors", header, b"\0" * 4))


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="header is said to be"):
        read_any(_safetensors(tmp_path / "a.safetensors", {}, length=2**60))


def test_nan_is_read_and_reported(tmp_path: Path) -> None:
    up = torch.zeros(3072, 1)
    up[5] = float("nan")
    save_file(
        {f"{STEM}.lora_down.weight": torch.ones(1, 768), f"{STEM}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    result = convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    assert result.not_finite == ["text_encoder.text_model.encoder.layers.0.mlp.fc1:lora_B"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(
        {f"{STEM}.lora_down.weight": torch.ones(1, 768), f"{STEM}.lora_up.weight": torch.ones(3072, 1)},
        tmp_path / "a.safetensors",
    )
    state, _ = read_any(tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    target.write_bytes(b"old")

    def full(path: Path, chunks: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DISK, "write", full)
    with pytest.raises(AdapterFileError, match=r"No space left.*untouched"):
        write_as(state, target, "kohya")
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_file_in_no_format(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"no format that is known here.*'weight'"):
        read_any(tmp_path / "a.safetensors")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    save_file(
        {f"{STEM}.lora_down.weight": torch.ones(1, 768), f"{STEM}.lora_up.weight": torch.ones(3072, 1)},
        tmp_path / "a.safetensors",
    )
    (tmp_path / "b.safetensors").write_bytes(b"old")
    with pytest.raises(AdapterFileError, match="--overwrite"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", overwrite=True)
    with pytest.raises(AdapterFileError, match="Did you mean 'kohya'"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohia")
    with pytest.raises(AdapterFileError, match="one file, which ends in"):
        convert(tmp_path / "a.safetensors", tmp_path / "c", "kohya")
