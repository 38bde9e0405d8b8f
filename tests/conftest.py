"""What holds for all tests."""

from __future__ import annotations

import os

# One process a core runs the tests: a second thread in each, or in the processes that tests start, would only spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
