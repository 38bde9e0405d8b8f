"""How much memory and disk is there, as the system tells it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path


def memory() -> tuple[int, int]:
    """All of main memory and what is free of it, in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
        return found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    if platform.system() != "Windows" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0
    return 0, 0


def free_disk(folder: Path) -> int:
    """The bytes that are free where a folder is or will be; 0 where nobody knows."""
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
    return 0 if there is None else shutil.disk_usage(there).free
