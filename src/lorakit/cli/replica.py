"""One server of several that `lorakit serve --replicas` starts: the program, which ends when the router has ended."""

from __future__ import annotations

import os
import signal
import threading

from lorakit.cli import main


def _end_with_the_router() -> None:
    """Read standard input, a pipe that the router holds: it closes however the router ends, be it by a kill."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_router, daemon=True).start()
    main()
