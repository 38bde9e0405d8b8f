"""Marks of the contract tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of the tests that compile."""
    config.addinivalue_line("markers", "compiled: runs torch.compile; select with `-m compiled`")
