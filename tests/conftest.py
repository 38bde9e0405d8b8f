"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lorakit.ops.native.load import Library

# One process a core runs the tests: a second thread in each, or in the processes that tests start, would only spin.
# torch reads this when it is imported, so nothing above imports it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def library() -> Library:
    """The compiled functions; they are built if nobody has built them for this environment yet."""
    from lorakit.errors import KernelError
    from lorakit.ops.native import build, load

    try:
        build.find_compiler()
    except KernelError as error:
        pytest.skip(f"no compiled product here: {error}")
    return load.read_library(build.build())  # with a compiler, a failure is one


@pytest.fixture
def resolve_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that looks for the library itself, whatever all tests are run with; the next one looks for itself."""
    from lorakit.ops.native import load

    monkeypatch.delenv(load.SWITCH, raising=False)
    load.forget()
    yield
    load.forget()
