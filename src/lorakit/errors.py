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
│   └── OutOfMemoryError (MemoryError)  memory ran out: which part is largest, and what to change
├── ModelError (ValueError)             a base model that cannot be found, fetched or read
├── KernelError (RuntimeError)          the compiled product cannot be built or loaded
├── MissingDependencyError (ImportError) an extra that is not installed
└── ServeError                          what a server answers; each with status, type and code:
    400 InvalidRequestError, InvalidAdapterIdError, AdapterCorruptError, UnsafeAdapterFormatError,
        AdapterIncompatibleError, ContextLengthError;  401 InvalidKeyError;
    403 AdapterUntrustedError, PermissionDeniedError
    404 ModelNotFoundError, AdapterNotFoundError;  409 AdapterBaseMismatchError, AdapterExistsError
    413 RequestTooLargeError;  429 RateLimitError;  499 ClientDisconnectedError, SlowReaderError
    500 InternalServeError;  503 AdapterCapacityError, OverloadedError, MemoryExhaustedError, EngineDeadError,
        ShuttingDownError, RequestAbortedError;  504 AdapterLoadTimeoutError, DeadlineExceededError
```

All say what was asked, what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


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


class OutOfMemoryError(TrainingError, MemoryError):
    """Memory ran out; the message says which part of it is largest and what to change."""


class ModelError(LorakitError, ValueError):
    """A base model cannot be found, fetched or read."""


class KernelError(LorakitError, RuntimeError):
    """The compiled low-rank product cannot be built or loaded; everything works without it."""


class MissingDependencyError(LorakitError, ImportError):
    """An optional dependency is not installed."""


class ServeError(LorakitError):
    """What a server answers instead of what was asked for.

    Attributes:
        status: HTTP status.
        type: The family, in OpenAI's words.
        code: The error itself, for programs.
        param: The field of the request that is to blame.
        retry_after: Seconds after which the same request may succeed; None where waiting does not help.
    """

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    param: str | None = None
    retry_after: float | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = type(self).param if param is None else param
        self.status = type(self).status if status is None else status
        self.retry_after = type(self).retry_after if retry_after is None else retry_after

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def again(self) -> ServeError:
        """The same error as another object, to be raised to another caller."""
        return type(self)(str(self), param=self.param, status=self.status, retry_after=self.retry_after)


class InvalidRequestError(ServeError, ValueError):
    """A request that makes no sense: an unknown field, a value of the wrong kind."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class ModelNotFoundError(ServeError, LookupError):
    """No model and no adapter has the name. The base never answers in its place."""

    status, type, code, param = 404, "not_found_error", "model_not_found", "model"


class InvalidAdapterIdError(ServeError, ValueError):
    """An adapter's name or path is not one that may be asked for."""

    status, type, code, param = 400, "invalid_request_error", "invalid_adapter_id", "model"


class AdapterCorruptError(ServeError, ValueError):
    """An adapter's file is damaged, or holds a NaN or an infinity; 424 when a request led to its loading."""

    status, type, code = 400, "invalid_request_error", "adapter_corrupt"


class UnsafeAdapterFormatError(ServeError, ValueError):
    """An adapter is a pickle, which a server never opens."""

    status, type, code = 400, "invalid_request_error", "unsafe_adapter_format"


class AdapterBaseMismatchError(ServeError, ValueError):
    """An adapter was made for another base model."""

    status, type, code = 409, "conflict_error", "adapter_base_mismatch"


class AdapterIncompatibleError(ServeError, ValueError):
    """A sound adapter that cannot be served: its method, a target, a missing or unexpected tensor, its size."""

    status, type, code = 400, "invalid_request_error", "adapter_incompatible"


class AdapterNotFoundError(ServeError, LookupError):
    """An adapter's file is not there or cannot be read."""

    status, type, code = 404, "not_found_error", "adapter_not_found"


class AdapterUntrustedError(ServeError, PermissionError):
    """An adapter is not signed by a trusted key, or is not what was signed."""

    status, type, code = 403, "permission_error", "adapter_untrusted"


class AdapterExistsError(ServeError, ValueError):
    """The name is taken."""

    status, type, code = 409, "conflict_error", "adapter_exists"


class AdapterLoadTimeoutError(ServeError, TimeoutError):
    """Reading an adapter took too long."""

    status, type, code = 504, "timeout_error", "adapter_load_timeout"


class AdapterCapacityError(ServeError, RuntimeError):
    """There is no room for an adapter: what is in memory is pinned or in use."""

    status, type, code, retry_after = 503, "overloaded_error", "adapter_capacity", 5.0


class ClientDisconnectedError(ServeError, ConnectionError):
    """The client went away; only the log sees this."""

    status, type, code = 499, "client_error", "client_disconnected"


class SlowReaderError(ServeError, ConnectionError):
    """The client reads a stream more slowly than it may."""

    status, type, code = 499, "client_error", "slow_reader"


class RateLimitError(ServeError, RuntimeError):
    """A key has used up what it may ask for in a time."""

    status, type, code, retry_after = 429, "rate_limit_error", "rate_limit_exceeded", 1.0


class OverloadedError(ServeError, RuntimeError):
    """The server has as much to do as it takes on."""

    status, type, code, retry_after = 503, "overloaded_error", "overloaded", 1.0


class RequestTooLargeError(ServeError, ValueError):
    """The body of a request has too many bytes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RequestAbortedError(ServeError, RuntimeError):
    """A running request was ended: its adapter was unloaded by force, or the server stops."""

    status, type, code = 503, "server_error", "request_aborted"


class ContextLengthError(ServeError, ValueError):
    """The prompt and what is to be generated do not fit in the model's context."""

    status, type, code = 400, "invalid_request_error", "context_length_exceeded"


class MemoryExhaustedError(ServeError, MemoryError):
    """There is not enough memory for the request."""

    status, type, code, retry_after = 503, "server_error", "out_of_memory", 5.0


class InternalServeError(ServeError, RuntimeError):
    """Something failed that should not; the details are in the server's log."""

    status, type, code = 500, "server_error", "internal_error"


class EngineDeadError(ServeError, RuntimeError):
    """The engine has stopped; it is being restarted."""

    status, type, code, retry_after = 503, "server_error", "engine_dead", 5.0


class InvalidKeyError(ServeError, PermissionError):
    """The API key is missing or wrong."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class PermissionDeniedError(ServeError, PermissionError):
    """The API key is good, and not for this: managing adapters and reading metrics need one that is marked as admin."""

    status, type, code = 403, "permission_error", "permission_denied"


class DeadlineExceededError(ServeError, TimeoutError):
    """The request's deadline passed before it was begun."""

    status, type, code = 504, "timeout_error", "deadline_exceeded"


class ShuttingDownError(ServeError, RuntimeError):
    """The server finishes what it has begun and takes on nothing new."""

    status, type, code, retry_after = 503, "server_error", "shutting_down", 10.0


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
