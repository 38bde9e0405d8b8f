"""Who may ask for what: API keys from a file, each with a tenant, the adapters it may use, and limits.

```json
{"keys": [
  {"key": "sk-acme-1", "tenant": "acme", "adapters": ["acme-*", "shared"], "requests_per_minute": 600, "in_flight": 8},
  {"sha256": "9f86d081884c7d65...", "tenant": "ops", "adapters": ["*"], "admin": true}
]}
```

A key stands in the file itself or as the SHA-256 of its UTF-8 bytes. `adapters` are names, or patterns with `*`. The
base model is for everyone who has a key. Loading, unloading, pinning, aliases, the metrics and the state need `admin`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field, StrictBool, ValidationError, model_validator

from lorakit.errors import ConfigError, InvalidKeyError, PermissionDeniedError
from lorakit.serve.api.schemas.fields import Strict


@dataclass(frozen=True)
class Tenant:
    """Who a request is from, and what it may do.

    Attributes:
        name: None for everyone, on a server without keys.
        adapters: Names or patterns of the adapters that it sees.
        admin: Whether it may load and unload, and read metrics.
        requests_per_minute: Most requests in a minute; None for no limit of its own.
        in_flight: Most requests at a time, waiting or running; None for the server's default.
    """

    name: str | None = None
    adapters: tuple[str, ...] = ("*",)
    admin: bool = True
    requests_per_minute: float | None = None
    in_flight: int | None = None

    def sees(self, adapter: str) -> bool:
        """Whether an adapter exists for this tenant; a version (`name@3`) is as visible as its name."""
        name = adapter.partition("@")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def require_admin(self) -> None:
        """Refuse what only an administrator may do.

        Raises:
            PermissionDeniedError: This tenant is none.
        """
        if not self.admin:
            raise PermissionDeniedError(
                "This needs an API key that is marked as admin in the server's keys file."
            )


ANYONE = Tenant()
"""The one tenant of a server without keys."""


class _Entry(Strict):
    key: Annotated[str, Field(min_length=8, max_length=1000)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    adapters: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=10_000)]
    admin: StrictBool = False
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    in_flight: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_key(self) -> _Entry:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give the key or its sha256, one of the two")
        return self

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.key.encode()).digest() if self.key else bytes.fromhex(self.sha256 or "")


class _File(Strict):
    keys: Annotated[list[_Entry], Field(min_length=1)]


class Keys:
    """All keys of a server; without any, everyone is let in."""

    def __init__(self, entries: Iterable[tuple[bytes, Tenant]] = ()) -> None:
        self._entries = tuple(entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """Read a keys file.

        Raises:
            ConfigError: It is missing or not as it should be; the message holds no key.
        """
        try:
            found = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"The keys file {path} cannot be read: {error.strerror}.") from error
        except ValidationError as error:  # its own text would show the keys
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ConfigError(f"The keys file {path} is not right: {where}: {first['msg']}.") from None
        digests = [entry.digest for entry in found.keys]
        if len(set(digests)) < len(digests):
            raise ConfigError(f"The keys file {path} holds the same key twice.")
        limits: dict[str, tuple[float | None, int | None]] = {}
        for entry in found.keys:
            limit = (entry.requests_per_minute, entry.in_flight)
            if limits.setdefault(entry.tenant, limit) != limit:
                raise ConfigError(
                    f"The keys file {path} gives the tenant {entry.tenant!r} different limits under different keys; "
                    "limits are a tenant's, so give each of its keys the same."
                )
        return cls(
            (
                entry.digest,
                Tenant(
                    name=entry.tenant,
                    adapters=tuple(entry.adapters),
                    admin=entry.admin,
                    requests_per_minute=entry.requests_per_minute,
                    in_flight=entry.in_flight,
                ),
            )
            for entry in found.keys
        )

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key a request carries.

        Every key is compared, and in constant time, so that the time to answer tells nothing about them.

        Args:
            authorization: The header: `Bearer KEY`.

        Raises:
            InvalidKeyError: There is none, or nobody has it.
        """
        if not self._entries:
            return ANYONE
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise InvalidKeyError(
                "This server needs an API key: send the header 'Authorization: Bearer KEY'."
            )
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        found = None
        for known, tenant in self._entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise InvalidKeyError("This API key is not known to the server.")
        return found
