"""Marks of the contract tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contracts import pairs
from tests.contracts.kinds import KINDS


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of the tests that compile."""
    config.addinivalue_line("markers", "compiled: runs torch.compile; select with `-m compiled`")


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare no finer than the layer under test computes."""
    callspec = getattr(request.node, "callspec", None)
    kind = callspec.params.get("kind") if callspec is not None else None
    pairs.precision = KINDS[kind].precision if kind in KINDS else 0.0
    yield
    pairs.precision = 0.0
