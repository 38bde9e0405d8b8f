"""How many steps the patterns of a file may take, so that reading it ends soon whatever they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lorakit.errors import ConfigError

_STEPS_OF_A_FILE = 10_000_000  # a few seconds


class Effort:
    """How many steps may still be taken.

    Args:
        left: That number; a step is a quarter of a microsecond or so.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, steps: int, pattern: str, text: str = "") -> None:
        """Take some for a pattern, to read it or to match it with a text.

        Raises:
            ConfigError: They are more than are left.
        """
        self.left -= steps
        if self.left < 0:
            where = f"to be matched with {brief(text)}" if text else "to be read"
            raise ConfigError(
                f"The pattern {brief(pattern)} takes too many steps {where}, alone or after the other patterns of its "
                "file. Take repeats out of its repeats, or name the layers in a list."
            )


_shared: ContextVar[Effort | None] = ContextVar("effort", default=None)


@contextmanager
def shared_effort() -> Iterator[None]:
    """All patterns inside a ``with`` block may together take no more steps than one file's may."""
    if current_effort() is not None:
        yield
        return
    token = _shared.set(Effort(_STEPS_OF_A_FILE))
    try:
        yield
    finally:
        _shared.reset(token)


def current_effort() -> Effort | None:
    """What the patterns of the file that is being read share; None where none is."""
    return _shared.get()


def take_steps(steps: int, pattern: str, text: str = "") -> None:
    """Take steps from those of the file that is being read, if one is; see `Effort.take`.

    Raises:
        ConfigError: The patterns of the file have taken too many.
    """
    if (shared := current_effort()) is not None:
        shared.take(steps, pattern, text)


def brief(text: str) -> str:
    """A text for a message, in quotes and cut where it is long."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
