"""``lorakit serve``: what is refused before a model is loaded. That it serves is tested in tests/serve/test_http.py."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.cli.conftest import Lorakit
from tests.tiny_chat import save_tiny_chat


def test_mistakes(lorakit: Lorakit, tmp_path: Path) -> None:
    model = save_tiny_chat(tmp_path / "tiny")
    folder = tmp_path / "adapters"
    assert "no folder" in lorakit("serve", model, "--adapters", folder).err
    folder.mkdir()
    assert "give --adapters" in lorakit("serve", model, "--preload", "sql").err
    keys = tmp_path / "keys.json"
    assert "cannot be read" in lorakit("serve", model, "--keys", keys).err
    keys.write_text(json.dumps({"keys": []}))
    assert "not right" in lorakit("serve", model, "--keys", keys).err
    assert "no base model" in lorakit("serve", tmp_path / "nope", "--port", 0).err
    assert "'fp32' or 'int8'" in lorakit("serve", model, "--port", 0, "--weights", "int3").err
    assert "'auto', 'native'" in lorakit("serve", model, "--port", 0, "--runner", "magic").err
    assert "has fp32" in lorakit("serve", model, "--port", 0, "--runner", "transformers", "-w", "int8").err
    missing = lorakit("serve", model, "-a", folder, "--port", 0, "--preload", "sql")
    assert missing.code == 2
    assert "sql" in missing.err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(lorakit: Lorakit, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = lorakit("serve", tmp_path / "nope", "--port", taken.getsockname()[1])
    assert outcome.code == 2
    assert "cannot listen" in outcome.err
