"""Names of base models: folders, hub ids, built-in ones, and what is none of these."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.errors import ModelError
from lorakit.models import ResolvedModel, resolve


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_read_not_fetched(folder, kind):
    found = resolve(kind(folder))
    assert found == ResolvedModel(str(folder), "folder", str(folder), "llama", ("LlamaForCausalLM",))
    assert found.path == folder


def test_a_relative_folder_wins_over_a_hub_id_of_the_same_form(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert resolve(name).kind == "folder"


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert resolve("~/my-model").path == folder


def test_a_hub_id_is_not_looked_up():
    found = resolve("org/no-such.model_1")
    assert (found.kind, found.location, found.path, found.family) == (
        "hub",
        "org/no-such.model_1",
        None,
        None,
    )


def test_what_was_found_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve("org/name").kind = "folder"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM2", "smollm2"),
        ("SmolLM2-135M-Instruct", "smollm2"),
        ("mini-lm", "minilm"),
        ("all-MiniLM-L6-v2", "minilm"),
    ],
)
def test_a_near_miss_of_a_builtin_is_named(name, meant):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert f"Did you mean '{meant}'?" in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "", "a/b/c", "org/", "../x", "no folder"])
def test_a_name_of_nothing_lists_the_builtin_models(name):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "  smollm2 " in message
    assert "  minilm " in message
    assert "org/name" in message


def test_a_near_miss_of_a_folder_is_named(folder):
    with pytest.raises(ModelError, match=r"Did you mean 'my-model'\?"):
        resolve(str(folder.parent / "my-modle"))


def test_a_path_object_is_never_a_builtin_or_a_hub_id():
    for name in ("smollm2", "org/name"):
        with pytest.raises(ModelError):
            resolve(Path(name))


def test_a_file_is_not_a_model(folder):
    with pytest.raises(ModelError, match="is a file"):
        resolve(folder / "config.json")


def test_a_folder_without_a_config_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config\.json \(it holds notes\.txt\)"):
        resolve(tmp_path)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(ModelError, match="it holds nothing"):
        resolve(tmp_path)


def test_an_adapter_is_not_a_base_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        resolve(folder)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(folder)


def test_importing_the_package_imports_no_transformers():
    check = "import sys, lorakit.models; print(sorted({'transformers', 'gguf', 'tokenizers'} & sys.modules.keys()))"
    out = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.model
def test_a_cached_builtin_is_found_at_once_and_offline(monkeypatch):
    resolve("smollm2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    begin = time.perf_counter()
    found = resolve("smollm2")
    assert time.perf_counter() - begin < 5
    assert (found.kind, found.family, found.licence) == ("builtin", "llama", "Apache-2.0")
    assert found.architectures == ("LlamaForCausalLM",)
    assert (found.path / "model.safetensors").is_file()
    assert resolve("minilm").family == "bert"
