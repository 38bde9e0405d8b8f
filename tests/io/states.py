"""Comparing adapters."""

from __future__ import annotations

import torch

from lorakit.core import AdapterState


def assert_equal(a: AdapterState, b: AdapterState) -> None:
    """The same spec, and every tensor the same in every bit, dtype included."""
    assert dict(a.spec.methods) == dict(b.spec.methods)
    assert dict(a.spec.shapes) == dict(b.spec.shapes)
    assert (a.spec.base, a.spec.info) == (b.spec.base, b.spec.info)
    assert a.tensors.keys() == b.tensors.keys()
    for path, group in a.tensors.items():
        assert group.keys() == b.tensors[path].keys()
        for name, tensor in group.items():
            other = b.tensors[path][name]
            assert tensor.dtype == other.dtype, (path, name)
            assert tensor.shape == other.shape, (path, name)
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)]
            assert torch.equal(*bits), (path, name)
