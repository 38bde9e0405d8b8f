"""``lorakit sign`` and ``lorakit verify``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.serve.manifest import MANIFEST
from tests.cli.conftest import Lorakit
from tests.serve.store_world import write
from tests.tiny_chat import save_tiny_chat

pytest.importorskip("cryptography")


def test_sign_and_verify(lorakit: Lorakit, tmp_path: Path) -> None:
    adapter, key, keys = tmp_path / "adapter", tmp_path / "me.pem", tmp_path / "keys.txt"
    write(adapter, 1)
    base = save_tiny_chat(tmp_path / "tiny")
    signed = lorakit("sign", adapter, "--key", key, "--new-key", "--base", base, "--json")
    assert signed.code == 0, signed.err
    manifest = json.loads(signed.out)
    assert manifest["manifest"] == str(adapter / MANIFEST)
    keys.write_text(f"{manifest['key']} me\n")
    verified = lorakit("verify", adapter, "--trusted", keys, "--base", base)
    assert verified.code == 0, verified.err
    assert "signed by" in verified.out
    assert "me" in verified.out
    (adapter / "notes.txt").write_text("later")
    assert json.loads(lorakit("verify", adapter, "--trusted", keys, "--json").out)["uncovered"] == [
        "notes.txt"
    ]
    other = save_tiny_chat(tmp_path / "other")
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    refused = lorakit("verify", adapter, "--trusted", keys, "--base", other)
    assert refused.code == 2
    assert "was signed for" in refused.err
    write(adapter, 2)
    refused = lorakit("verify", adapter, "--trusted", keys)
    assert refused.code == 2
    assert "not what was signed" in refused.err
    assert "Traceback" not in refused.err


def test_mistakes(lorakit: Lorakit, tmp_path: Path) -> None:
    write(tmp_path / "adapter", 1)
    assert "cannot be read" in lorakit("sign", tmp_path / "adapter", "--key", tmp_path / "no.pem").err
    (tmp_path / "keys.txt").write_text("nonsense\n")
    assert "line 1" in lorakit("verify", tmp_path / "adapter", "--trusted", tmp_path / "keys.txt").err
    done = lorakit("sign", tmp_path / "adapter", "--key", tmp_path / "k.pem", "--new-key")
    assert "any (give --base" in done.out
    refused = lorakit("sign", tmp_path / "adapter", "--key", tmp_path / "k.pem", "--base", "someone/model")
    assert "not on this disk" in refused.err
