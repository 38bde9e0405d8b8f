"""Signed manifests: what an adapter's files are, which base it is for, and who vouches for it.

``lorakit-manifest.json`` lies beside the adapter's files::

    {"format": 1,
     "files": {"adapter_config.json": {"bytes": 812, "sha256": "..."}, ...},
     "base": {"digest": "...", "name": "..."},
     "signed_at": "2026-01-31T12:00:00+00:00",
     "key": "ed25519:...",
     "signature": "..."}

The signature is Ed25519 (RFC 8032) in base64, over the bytes ``lorakit adapter manifest 1`` and a newline, followed by
the object without its ``signature`` as JSON with sorted keys, no blanks and only ASCII. ``key`` is the signer's public
key, 32 bytes in base64: it tells who signed, and is trusted only where it is listed as trusted.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lorakit.errors import (
    AdapterFileError,
    AdapterUntrustedError,
    ConfigError,
    MissingDependencyError,
    listing,
)
from lorakit.serve.base_facts import digest_of_file

MANIFEST = "lorakit-manifest.json"
FORMAT = 1
_CONTEXT = b"lorakit adapter manifest 1\n"
_PREFIX = "ed25519:"
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """What a manifest says, before any of it is checked.

    Attributes:
        files: File name to its size and SHA-256.
        base_digest: See `lorakit.serve.base_facts.digest_of_weights`; None where it was not said.
        base_name: Information.
        signed_at: In ISO 8601; information.
        key: The signer's public key, ``ed25519:`` and base64.
        signature: In base64.
    """

    files: Mapping[str, tuple[int, str]]
    base_digest: str | None = None
    base_name: str | None = None
    signed_at: str = ""
    key: str = ""
    signature: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "format": FORMAT,
            "files": {n: {"bytes": size, "sha256": sha} for n, (size, sha) in sorted(self.files.items())},
            "base": {"digest": self.base_digest, "name": self.base_name},
            "signed_at": self.signed_at,
            "key": self.key,
            "signature": self.signature,
        }

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        content = {key: value for key, value in self.to_json().items() if key != "signature"}
        return _CONTEXT + json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys whose signatures count.

    Attributes:
        keys: The key as text to what it is called.
    """

    keys: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | str) -> TrustedKeys:
        """Read a file with a key a line: ``ed25519:...``, then anything as its name; ``#`` begins a comment.

        Raises:
            ConfigError: The file cannot be read, holds no key, or a line is no key.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The trusted keys in {path} cannot be read: {error}.") from None
        keys = {}
        for number, line in enumerate(lines, 1):
            words = line.split("#", 1)[0].split(None, 1)
            if words:
                if _raw_key(words[0]) is None:
                    raise ConfigError(
                        f"{path}, line {number}: {words[0][:80]!r} is no public key. A line is ed25519:... and a name."
                    )
                keys[words[0]] = words[1].strip() if len(words) > 1 else words[0]
        if not keys:
            raise ConfigError(f"{path} holds no key: nothing at all would be trusted.")
        return cls(keys)


def make_key(path: Path | str) -> str:
    """Make a new private key in a file that only its owner can read; the public key.

    Raises:
        ConfigError: The file exists already, or cannot be written.
    """
    ed25519, serialization = _cryptography()
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; a key is never overwritten.") from None
    except OSError as error:
        raise ConfigError(f"The key cannot be written to {path}: {error.strerror or error}.") from None
    return _public_text(private)


def sign(
    directory: Path | str,
    key: Path | str,
    *,
    base_digest: str | None = None,
    base_name: str | None = None,
) -> Manifest:
    """Sign the files of an adapter's folder, all but hidden ones, and write the manifest beside them.

    Args:
        directory: The folder.
        key: The private key's file, in PEM (`make_key`, ``openssl genpkey -algorithm ed25519``).
        base_digest: Digest of the base's weights, so that the adapter is refused on any other base.
        base_name: What the base is called.

    Raises:
        AdapterFileError: The folder holds no files, or the manifest cannot be written.
        ConfigError: The key cannot be read.
    """
    directory = Path(directory)
    private = _private_key(Path(key))
    paths = _covered(directory)
    if not paths:
        raise AdapterFileError(f"{directory} holds no files to sign.")
    files = {path.name: (path.stat().st_size, digest_of_file(path)) for path in paths}
    now = datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    unsigned = Manifest(files, base_digest, base_name, now, _public_text(private))
    signature = base64.b64encode(private.sign(unsigned.signed_bytes())).decode("ascii")
    signed = replace(unsigned, signature=signature)
    temporary = directory / f".{MANIFEST}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_text(json.dumps(signed.to_json(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, directory / MANIFEST)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AdapterFileError(
            f"The manifest cannot be written to {directory}: {error.strerror or error}."
        ) from None
    return signed


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; nothing of it is checked but its form.

    Raises:
        AdapterUntrustedError: There is none, or it has another form.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        data = json.loads(path.read_bytes().decode("utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']!r}, not {FORMAT}")
        files = {str(n): (int(facts["bytes"]), str(facts["sha256"])) for n, facts in data["files"].items()}
        base = data["base"]
        manifest = Manifest(
            files, base["digest"], base["name"], data["signed_at"], data["key"], data["signature"]
        )
        texts = (
            manifest.base_digest,
            manifest.base_name,
            manifest.signed_at,
            manifest.key,
            manifest.signature,
        )
        if not all(text is None or isinstance(text, str) for text in texts) or manifest.to_json() != data:
            raise ValueError("it has fields of another kind")
    except FileNotFoundError:
        raise AdapterUntrustedError(
            f"The adapter is not signed: it has no {MANIFEST}. Sign it with: lorakit sign DIR --key KEY."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterUntrustedError(f"{MANIFEST} is not as lorakit writes it: {error}.") from None
    return manifest


def verify_files(directory: Path, trusted: TrustedKeys, *, needed: Iterable[str] = ()) -> Manifest:
    """Check that a trusted key has signed the files in a folder, and that they are what was signed.

    Args:
        directory: With the manifest in it.
        trusted: The keys that count.
        needed: Files that must be covered.

    Raises:
        AdapterUntrustedError: A check failed; the message says which.
    """
    manifest = read_manifest(directory / MANIFEST)
    if manifest.key not in trusted.keys:
        raise AdapterUntrustedError(
            f"The adapter is signed with a key that is not trusted here: {manifest.key[:80]}."
        )
    _check_signature(manifest)
    uncovered = sorted({*needed} - {*manifest.files, MANIFEST})
    if uncovered:
        raise AdapterUntrustedError(f"The manifest does not cover {listing(uncovered)}.")
    wrong = []
    for name, (size, sha) in manifest.files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise AdapterUntrustedError(f"The manifest names {name[:100]!r}, which is no file of its folder.")
        path = directory / name
        if needed and name not in needed:
            continue  # not read, so it does not matter here
        try:
            same = path.stat().st_size == size and digest_of_file(path) == sha
        except OSError:
            same = False
        if not same:
            wrong.append(name)
    if wrong:
        raise AdapterUntrustedError(
            f"{listing(wrong)} is not what was signed: it was changed or damaged afterwards, or is missing."
        )
    return manifest


def uncovered_files(directory: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the manifest says nothing about."""
    return [path.name for path in _covered(directory) if path.name not in manifest.files]


def _covered(directory: Path) -> Sequence[Path]:
    try:
        return sorted(
            p
            for p in directory.iterdir()
            if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")
        )
    except OSError as error:
        raise AdapterFileError(f"{directory} cannot be read: {error.strerror or error}.") from None


def _check_signature(manifest: Manifest) -> None:
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    raw = _raw_key(manifest.key)
    try:
        if raw is None:
            raise ValueError
        signature = base64.b64decode(manifest.signature, validate=True)
        ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(signature, manifest.signed_bytes())
    except (InvalidSignature, ValueError, UnicodeError):
        raise AdapterUntrustedError(
            "The manifest's signature is wrong: the manifest was changed after it was signed."
        ) from None


def _private_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The private key in {path} cannot be read: {error}.") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a key of another kind; signing takes an Ed25519 key.")
    return key


def _public_text(private: Any) -> str:
    _, serialization = _cryptography()
    raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode("ascii")


def _raw_key(text: str) -> bytes | None:
    """The 32 bytes of a public key, or None when it is none."""
    try:
        raw = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if text.startswith(_PREFIX) and len(raw) == 32 else None


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingDependencyError(
            "Signatures need cryptography. Install it with: pip install 'lorakit[sign]'"
        ) from error
    return ed25519, serialization
