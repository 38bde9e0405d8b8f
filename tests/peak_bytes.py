"""How many bytes torch's allocator has given out at the worst moment of a step, temporaries inside kernels included."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a step on the CPU holds at one time, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]")
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    assert peak > 0
    return peak
