"""Signed manifests, and a store that serves only what is signed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lorakit.errors import (
    AdapterBaseMismatchError,
    AdapterFileError,
    AdapterUntrustedError,
    ConfigError,
    MissingDependencyError,
)
from lorakit.io.adapter_directory import CONFIG, WEIGHTS
from lorakit.serve import manifest as manifests
from lorakit.serve.base_facts import BaseFacts, digest_of_weights
from lorakit.serve.manifest import (
    MANIFEST,
    TrustedKeys,
    make_key,
    read_manifest,
    sign,
    uncovered_files,
    verify_files,
)
from tests.serve.store_world import facts, new_store, same, write

pytest.importorskip("cryptography")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def adapter(tmp_path: Path, key: Path) -> Path:
    write(tmp_path / "adapters" / "signed", 1)
    sign(tmp_path / "adapters" / "signed", key, base_digest="b" * 64, base_name="tiny")
    return tmp_path / "adapters" / "signed"


@pytest.fixture
def trusted(adapter: Path) -> TrustedKeys:
    return TrustedKeys({read_manifest(adapter / MANIFEST).key: "me"})


def test_what_was_signed_is_verified(adapter: Path, trusted: TrustedKeys) -> None:
    manifest = verify_files(adapter, trusted)
    assert set(manifest.files) == {CONFIG, WEIGHTS}
    assert (manifest.base_digest, manifest.base_name) == ("b" * 64, "tiny")
    assert uncovered_files(adapter, manifest) == []
    (adapter / "README.md").write_text("later")
    assert uncovered_files(adapter, verify_files(adapter, trusted)) == ["README.md"]


def test_the_private_key_is_for_its_owner_alone(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never overwritten"):
        make_key(key)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_changed_file(adapter: Path, trusted: TrustedKeys, name: str) -> None:
    data = bytearray((adapter / name).read_bytes())
    data[-2] ^= 1
    (adapter / name).write_bytes(data)
    with pytest.raises(AdapterUntrustedError, match=name):
        verify_files(adapter, trusted)
    (adapter / name).unlink()
    with pytest.raises(AdapterUntrustedError, match=name):
        verify_files(adapter, trusted)


def edited(adapter: Path, **changes: object) -> None:
    path = adapter / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {"digest": None, "name": None}},
        {"signed_at": "1999-01-01T00:00:00+00:00"},
        {"files": {}},
        {"signature": base64.b64encode(bytes(64)).decode()},
        {"signature": "not base64!"},
        {"signature": ""},
    ],
)
def test_a_changed_manifest(adapter: Path, trusted: TrustedKeys, changes: dict[str, object]) -> None:
    edited(adapter, **changes)
    with pytest.raises(AdapterUntrustedError, match="signature is wrong"):
        verify_files(adapter, trusted)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"files": [1]},
        {"base": None},
        {"key": 7},
        {"extra": 1},
        {"files": {"a": {"bytes": "x"}}},
    ],
)
def test_a_manifest_of_another_form(adapter: Path, trusted: TrustedKeys, changes: dict[str, object]) -> None:
    edited(adapter, **changes)
    with pytest.raises(AdapterUntrustedError, match="not as lorakit writes it"):
        verify_files(adapter, trusted)


def test_files_elsewhere_are_not_looked_at(adapter: Path, key: Path, trusted: TrustedKeys) -> None:
    """Even a trusted signer cannot have a file outside of the folder read."""
    original = manifests._covered
    secret = adapter.parent / "secret"
    secret.write_text("x")

    class Elsewhere(type(secret)):  # type: ignore[misc]
        name = "../secret"

    try:
        manifests._covered = lambda directory: [*original(directory), Elsewhere(secret)]
        sign(adapter, key)
    finally:
        manifests._covered = original
    with pytest.raises(AdapterUntrustedError, match="no file of its folder"):
        verify_files(adapter, trusted)


def test_another_key(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterUntrustedError, match="not trusted here"):
        verify_files(adapter, TrustedKeys({make_key(tmp_path / "other.pem"): "other"}))


def test_a_key_put_in_place_of_the_signer(adapter: Path, tmp_path: Path) -> None:
    mine = make_key(tmp_path / "other.pem")
    edited(adapter, key=mine)
    with pytest.raises(AdapterUntrustedError, match="signature is wrong"):
        verify_files(adapter, TrustedKeys({mine: "other"}))


def test_the_file_of_trusted_keys(tmp_path: Path, trusted: TrustedKeys) -> None:
    (key,) = trusted.keys
    path = tmp_path / "keys.txt"
    path.write_text(f"# ours\n\n{key}  Ann of the SQL team  # since May\n")
    assert TrustedKeys.read(path).keys == {key: "Ann of the SQL team"}
    for text, match in (("", "no key"), ("ssh-ed25519 AAAA", "line 1"), ("ed25519:AAAA x", "line 1")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            TrustedKeys.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        TrustedKeys.read(tmp_path / "nowhere")


def test_keys_that_cannot_sign(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.pem").write_text("noise")
    with pytest.raises(ConfigError, match="cannot be read"):
        sign(adapter, tmp_path / "noise.pem")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (tmp_path / "ec.pem").write_bytes(pem)
    with pytest.raises(ConfigError, match="another kind"):
        sign(adapter, tmp_path / "ec.pem")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="no files"):
        sign(tmp_path / "empty", tmp_path / "key.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_agrees(adapter: Path, tmp_path: Path, key: Path) -> None:
    """Another program reads the key and verifies the signature over the bytes that the documentation gives."""
    data = json.loads((adapter / MANIFEST).read_text())
    signature = base64.b64decode(data.pop("signature"))
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    (tmp_path / "signed").write_bytes(b"lorakit adapter manifest 1\n" + text.encode("ascii"))
    (tmp_path / "signature").write_bytes(signature)
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-inkey", str(key), "-in", str(tmp_path / "signed")]
    done = subprocess.run(
        [*command, "-sigfile", str(tmp_path / "signature")], capture_output=True, check=False
    )
    assert b"Verified Successfully" in done.stdout, done.stderr


def test_without_the_library(adapter: Path, monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingDependencyError, match=r"lorakit\[sign\]"):
        sign(adapter, key)


# ---- a store that asks for signatures
def with_digest(digest: str) -> BaseFacts:
    known = facts()
    return BaseFacts(known.outline, known.layers, digest, known.name)


def test_only_what_is_signed_is_served(adapter: Path, trusted: TrustedKeys) -> None:
    root = adapter.parent
    state = write(root / "plain", 2)
    shutil.copytree(adapter, root / "changed")
    write(root / "changed", 3)
    with new_store(root, trusted=trusted) as store:
        with store.acquire("signed").result(10) as lease:
            assert lease.version.rank == 4
        for name, match in (("plain", "not signed"), ("changed", "not what was signed")):
            for error in (store.acquire(name).exception(10), store.load("new", name).exception(10)):
                assert isinstance(error, AdapterUntrustedError)
                assert (error.status, error.type, error.code) == (
                    403,
                    "permission_error",
                    "adapter_untrusted",
                )
                assert match in str(error)
    with new_store(root) as store:  # without the policy, signatures do not matter
        assert same(store.acquire("plain").result(10).version.state, state)
        store.acquire("changed").result(10)


def test_what_is_verified_is_what_is_read(
    adapter: Path, trusted: TrustedKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files replaced between the check and the reading change nothing: copies are checked, and the copies are read."""
    before = (adapter / WEIGHTS).read_bytes()
    verify = manifests.verify_files

    def then_replace(*arguments: object, **settings: object) -> object:
        found = verify(*arguments, **settings)  # type: ignore[arg-type]
        write(adapter, 9)
        return found

    monkeypatch.setattr("lorakit.serve.sources.verify_files", then_replace)
    with new_store(adapter.parent, trusted=trusted) as store, store.acquire("signed").result(10) as lease:
        (adapter / WEIGHTS).write_bytes(before)
        from lorakit.io import read

        assert same(lease.version.state, read(adapter, prefer="weights"))


def test_another_base_by_its_digest(adapter: Path, trusted: TrustedKeys) -> None:
    for policy in (None, trusted):
        with new_store(adapter.parent, base=with_digest("c" * 64), trusted=policy) as store:
            error = store.acquire("signed").exception(10)
            assert isinstance(error, AdapterBaseMismatchError)
            assert "b" * 64 in str(error)
        with new_store(adapter.parent, base=with_digest("b" * 64), trusted=policy) as store:
            store.acquire("signed").result(10)


def test_the_digest_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = digest_of_weights(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert digest_of_weights(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert digest_of_weights(tmp_path) != first
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights"):
        digest_of_weights(tmp_path)
