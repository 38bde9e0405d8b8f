"""Every exception that lorakit raises on purpose.

```
LorakitError
├── TargetError (ValueError)            a target was named that cannot be found or adapted
│   ├── UnmatchedTargetError            a pattern matched nothing
│   └── UnsupportedTargetError          a method cannot work on a layer, and why
├── ConfigError (ValueError)            a setting that makes no sense (rank, recipe key, ...)
│   └── RecipeError                     a recipe file: which key, which line, what was meant
├── AdapterNameError (KeyError)         an adapter name unknown, used twice, or not allowed
├── NotAttachedError (LookupError)      the model carries no adapters
├── RoutingError (RuntimeError)         this call cannot be routed as asked
├── MergeError (RuntimeError)           merging or unmerging is not possible as things stand
├── AdapterFileError (ValueError)       an adapter file is missing, damaged, or of another kind
│   └── AdapterMismatchError            a sound file that does not fit this model
├── DataError (ValueError)              a data file: which line, what was wrong
├── ExecutionError (RuntimeError)       a SQL query that could not be run
├── TrainingError (RuntimeError)        a run that cannot go on: the loss is not finite, nothing to resume
├── ModelError (ValueError)             a base model that cannot be found, fetched or read
├── KernelError (RuntimeError)          the compiled product cannot be built or loaded
└── MissingDependencyError (ImportError) an extra that is not installed
```

All say what was asked, what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakitError(Exception):
    """The root of every exception raised by lorakit."""

    def __str__(self) -> str:  # KeyError would print the repr, with escaped newlines
        return str(self.args[0]) if self.args else ""


class TargetError(LorakitError, ValueError):
    """A target was named that cannot be found or adapted."""


class UnmatchedTargetError(TargetError):
    """A target pattern, or one entry of a list, matched nothing."""


class UnsupportedTargetError(TargetError):
    """A method cannot work on a layer; the message gives the reason."""


class ConfigError(LorakitError, ValueError):
    """A setting has a value that makes no sense."""


class RecipeError(ConfigError):
    """A recipe file has an unknown key or a value of the wrong kind."""


class AdapterNameError(LorakitError, KeyError):
    """An adapter name is unknown, already used, or not allowed."""


class NotAttachedError(LorakitError, LookupError):
    """The model carries no adapters."""


class RoutingError(LorakitError, RuntimeError):
    """A forward pass cannot be routed through the adapters as asked."""


class MergeError(LorakitError, RuntimeError):
    """Merging or unmerging is not possible as things stand; the base is untouched."""


class AdapterFileError(LorakitError, ValueError):
    """An adapter file is missing, damaged, or of another kind."""


class AdapterMismatchError(AdapterFileError):
    """An adapter is sound but does not fit the model it was to be attached to."""


class DataError(LorakitError, ValueError):
    """A data file is empty or malformed; the message names the line."""


class ExecutionError(LorakitError, RuntimeError):
    """A SQL query could not be run."""


class TrainingError(LorakitError, RuntimeError):
    """A training run cannot go on, or there is none to resume."""


class ModelError(LorakitError, ValueError):
    """A base model cannot be found, fetched or read."""


class KernelError(LorakitError, RuntimeError):
    """The compiled low-rank product cannot be built or loaded; everything works without it."""


class MissingDependencyError(LorakitError, ImportError):
    """An optional dependency is not installed."""


def near_matches(word: str, known: Iterable[str], *, n: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string when nothing is near.

    Args:
        word: What the user wrote.
        known: What would have been right.
        n: The most suggestions to give.
    """
    choices = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, choices, n=n, cutoff=0.6)
    close += [c for c in choices if word.lower() in c.lower() and c not in close][: n - len(close)]
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(c) for c in close)}?"


def listing(items: Iterable[str], *, most: int = 8) -> str:
    """Join names for a message, cutting a long list and saying how many were left out."""
    names = list(items)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names) - most} more)"
