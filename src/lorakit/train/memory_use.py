"""How much memory a run takes."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes that were in use at once: of this process in memory, or of torch's tensors on a GPU.

    0 where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, the others kilobytes
