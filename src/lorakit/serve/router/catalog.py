"""What a request needs, as the key that decides who answers it: names that lead to one content have one key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.errors import ServeError
from lorakit.serve.api.naming import parse_model


class Catalog:
    """The names and digests that the replicas have told of.

    The key of an adapter is the name under which its content was first seen, not the digest itself: the digest is
    known only after the first request, and the second must go where the first one went.
    """

    def __init__(self) -> None:
        self.base: str | None = None
        self._digests: dict[str, str] = {}
        self._first: dict[str, str] = {}

    def learn(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take in what a replica lists at `/v1/adapters`."""
        listed = list(entries)
        for entry in sorted(listed, key=lambda entry: entry["alias_of"] is not None):
            name, digest = str(entry["id"]), entry["digest"]
            if digest is None:
                continue
            self._digests[name] = digest
            self._first.setdefault(digest, (entry["alias_of"] or name).partition("@")[0])

    def forget(self, name: str) -> None:
        """A name has been taken away; it may mean something else when it comes back."""
        self._digests.pop(name, None)

    def key(self, path: str, body: bytes) -> str | None:
        """The key of a request for an answer; None for the base, and for what a replica will refuse anyway."""
        try:
            asked = json.loads(body)
            model = _lorax_model(asked.get("parameters")) if path.startswith("/generate") else asked["model"]
            if not model:
                return None
            wanted = parse_model(model, self.base or "")
        except (ServeError, ValueError, LookupError, TypeError, AttributeError):
            return None
        if wanted.name is not None:
            return self._root(wanted.name)
        parts = sorted(f"{self._root(name)}:{weight:g}" for name, weight in wanted.mix.items())
        return "+".join(parts) or None

    def _root(self, name: str) -> str:
        plain = name.partition("@")[0]
        digest = self._digests.get(name) or self._digests.get(plain)
        return plain if digest is None else self._first[digest]


def _lorax_model(parameters: Mapping[str, Any] | None) -> str:
    if not parameters:
        return ""
    merged = parameters.get("merged_adapters")
    if merged:
        weights = merged.get("weights") or [1.0] * len(merged["ids"])
        return "+".join(f"{name}:{weight:g}" for name, weight in zip(merged["ids"], weights, strict=True))
    return str(parameters.get("adapter_id") or "")
