"""One file, replaced whole or not at all; and tensors from a pickle, when that is allowed."""

from __future__ import annotations

import contextlib
import pickle
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.io.publish import DISK


def publish_file(path: Path, content: Iterable[Any]) -> None:
    """Put a file in place by writing it under another name, forcing it to disk, and renaming it.

    Raises:
        AdapterFileError: It could not be done; what was there before is untouched.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        DISK.write(temporary, content)
        DISK.rename(temporary, path)
        DISK.sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AdapterFileError(
            f"{path} could not be written: {reason}. What was there before is untouched."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch pickle, and nothing but tensors.

    Raises:
        AdapterFileError: It holds something else, or is damaged.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterFileError(f"{path} is damaged, or holds more than tensors: {first}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise AdapterFileError(f"{path} is not a mapping from names to tensors.")
    return {key: value.detach() for key, value in loaded.items()}
