"""What a request needs in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorakit.serve.router.catalog import Catalog


def entry(name: str, digest: str | None, alias_of: str | None = None) -> dict[str, Any]:
    return {"id": name, "digest": digest, "alias_of": alias_of}


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog()
    made.base = "tiny"
    return made


def key(catalog: Catalog, model: Any) -> str | None:
    return catalog.key("/v1/chat/completions", json.dumps({"model": model}).encode())


def test_names_of_one_content_have_one_key(catalog: Catalog) -> None:
    before = key(catalog, "sql")
    catalog.learn([entry("prod", "d1", "sql@1"), entry("sql", "d1"), entry("style", None)])
    assert key(catalog, "sql") == before == "sql", "the second request goes where the first one went"
    assert key(catalog, "sql@1") == key(catalog, "prod") == "sql"
    catalog.learn([entry("copy", "d1"), entry("sql", "d2")])
    assert key(catalog, "copy") == key(catalog, "sql") == "sql"
    catalog.forget("copy")
    assert key(catalog, "copy") == "copy"


def test_mixes(catalog: Catalog) -> None:
    catalog.learn([entry("prod", "d1", "sql@1")])
    assert key(catalog, "style:0.3+prod:0.7") == key(catalog, "sql:.70+style:0.3") == "sql:0.7+style:0.3"
    assert key(catalog, "sql:0.5") != key(catalog, "sql")


@pytest.mark.parametrize("model", ["tiny", "", None, 3, [], "../x", "a:b", {"a": 1}])
def test_what_needs_no_adapter_or_will_be_refused_has_no_key(catalog: Catalog, model: Any) -> None:
    assert key(catalog, model) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b"\xff", b'"model"', b"null"])
def test_bodies_that_are_none(catalog: Catalog, body: bytes) -> None:
    assert catalog.key("/v1/completions", body) is None
    assert catalog.key("/generate", body) is None


def test_loraxs_parameters(catalog: Catalog) -> None:
    def asked(parameters: Any) -> str | None:
        return catalog.key("/generate_stream", json.dumps({"inputs": "x", "parameters": parameters}).encode())

    assert asked({"adapter_id": "sql"}) == "sql"
    assert asked({}) is None
    assert asked({"adapter_id": None}) is None
    merged = {"ids": ["style", "sql"], "weights": [0.25, 1]}
    assert asked({"merged_adapters": merged}) == key(catalog, "sql+style:0.25")
    assert asked({"merged_adapters": {"ids": ["a"], "weights": [1, 2]}}) is None
