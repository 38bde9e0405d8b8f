"""API keys: the file, who a key is, and what it may see."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, InvalidKeyError, PermissionDeniedError
from lorakit.serve.api.auth import ANYONE, Keys, Tenant

SHA = hashlib.sha256(b"the other key").hexdigest()


def read(folder: Path, *entries: dict[str, Any]) -> Keys:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": list(entries)}))
    return Keys.from_file(path)


def test_keys_as_text_and_as_digest(tmp_path: Path) -> None:
    keys = read(
        tmp_path,
        {
            "key": "the-first-key",
            "tenant": "one",
            "adapters": ["a-*"],
            "requests_per_minute": 5,
            "in_flight": 2,
        },
        {"sha256": SHA, "tenant": "two", "adapters": ["*"], "admin": True},
    )
    one, two = keys.tenant("Bearer the-first-key"), keys.tenant("bearer the other key ")
    assert one == Tenant("one", ("a-*",), False, 5, 2)
    assert (two.name, two.admin) == ("two", True)
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic the-first-key",
        "Bearer the-first-kex",
        f"Bearer {SHA}",
    ):
        with pytest.raises(InvalidKeyError):
            keys.tenant(wrong)


def test_without_keys_everyone_may_do_everything() -> None:
    assert Keys().tenant(None) is ANYONE
    assert not Keys()
    ANYONE.require_admin()
    assert ANYONE.sees("anything")


def test_what_a_tenant_sees() -> None:
    tenant = Tenant("t", ("acme-*", "shared"), admin=False)
    assert [
        n for n in ("acme-1", "acme-1@2", "shared", "shared@9", "sharedx", "Acme-1") if tenant.sees(n)
    ] == [
        "acme-1",
        "acme-1@2",
        "shared",
        "shared@9",
    ]
    with pytest.raises(PermissionDeniedError, match="admin"):
        tenant.require_admin()


GOOD = {"key": "long-enough", "tenant": "t", "adapters": []}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "keys"),
        ([{**GOOD, "key": "short"}], "key"),
        ([{**GOOD, "sha256": SHA}], "one of the two"),
        ([{"tenant": "t", "adapters": []}], "one of the two"),
        ([{**GOOD, "tenant": "no spaces"}], "tenant"),
        ([{"key": "long-enough", "tenant": "t"}], "adapters"),
        ([{**GOOD, "adaptors": []}], "adaptors"),
        ([GOOD, GOOD], "twice"),
        ([GOOD, {**GOOD, "key": "another-one", "in_flight": 3}], "different limits"),
    ],
)
def test_files_that_are_not_right(tmp_path: Path, entries: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, *entries)
    assert "long-enough" not in str(caught.value)  # keys stay out of messages


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.from_file(tmp_path / "none.json")
