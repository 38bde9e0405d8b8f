"""Where lorakit keeps what it can make again: fetched models, compiled products."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; it is not created here.

    `$LORAKIT_CACHE`; else `$XDG_CACHE_HOME/lorakit`; else the system's habit: `~/Library/Caches/lorakit` on macOS,
    `%LOCALAPPDATA%/lorakit/cache` on Windows, `~/.cache/lorakit` elsewhere.
    """
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lorakit"
    return _system_cache(sys.platform, os.environ, Path.home())


def _system_cache(platform: str, environment: Mapping[str, str], home: Path) -> Path:
    if platform == "darwin":
        return home / "Library" / "Caches" / "lorakit"
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "lorakit" / "cache"
    return home / ".cache" / "lorakit"
