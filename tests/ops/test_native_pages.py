"""Tensors in large pages: whole, apart from each other, and as they were."""

import sys

import pytest
import torch

from lorakit.ops.native.pages import Together, room


def resident_in_large_pages():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages")) * 1024


def test_tensors_lie_one_behind_the_other_and_keep_what_they_are_given():
    together = Together(size=1 << 20)
    given = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 17, 4000, 90_000)]
    given.append(torch.arange(-100, 101, dtype=torch.int8))
    kept = [together.copied(t) for t in given]
    kept.append(together.copied(torch.ones(4, 6).T))  # what does not lie in rows does so afterwards
    for copy, t in zip(kept, [*given, torch.ones(6, 4)], strict=True):
        assert torch.equal(copy, t)
        assert copy.dtype == t.dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
    first, second = kept[0], kept[1]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_memory_is_given_back_with_the_last_tensor():
    tensor = room(8 << 20)
    assert tensor.shape == (8 << 20,)
    tensor.fill_(7)
    part = tensor[5:9].clone()
    del tensor
    assert part.tolist() == [7, 7, 7, 7]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counted as Linux counts")
def test_large_pages_are_asked_for():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            allowed = "[never]" not in file.read()
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this system has no large pages to give")
    before = resident_in_large_pages()
    held = room(64 << 20).fill_(1)
    gained = resident_in_large_pages() - before
    if gained == 0:
        pytest.skip("the system has no large page left")
    assert gained > 32 << 20
    del held
    assert resident_in_large_pages() <= before
