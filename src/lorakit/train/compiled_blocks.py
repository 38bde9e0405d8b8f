"""A model's blocks, compiled by ``torch.compile`` for the training steps.

Block by block and not the whole: a graph of one block is compiled in a fraction of the time, and the compiler's cache
knows it again in the next block. The lengths of batches are symbols, so that a batch of another length is no new graph.
Packed attention goes over documents one by one, which no graph can hold: there a block is cut in two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorakit.errors import ConfigError, KernelError, MissingDependencyError
from lorakit.ops.native.build import find_compiler
from lorakit.train.frozen_part import block_lists

# Before and behind the attention, the first length and any other, with and without gradients: each is a graph.
_GRAPHS_A_BLOCK = 8
_BACKEND = "inductor"


class CompiledBlocks:
    """The blocks of a model, which run compiled inside `running` and as they are elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is compiled yet: that happens when a block first runs.

        Raises:
            ConfigError: The model has no list of blocks.
            MissingDependencyError: There is no compiler for the model's device.
        """
        lists = block_lists(model)
        if not lists:
            raise ConfigError(
                f"train.compile compiles a model block by block; {type(model).__name__} has no list of blocks. Leave "
                "train.compile out."
            )
        _check_compiler(next(model.parameters()).device.type)
        self.blocks = tuple(block for blocks in lists.values() for block in blocks)
        self._compiled: dict[nn.Module, Any] = {}
        for block in self.blocks:
            block.compile(dynamic=True, backend=_BACKEND)
            self._compiled[block] = block._compiled_call_impl
            block._compiled_call_impl = None

    @contextmanager
    def running(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside the block the model's blocks run compiled, whatever the rows are; backward belongs inside too."""
        from torch._dynamo import config

        most = _GRAPHS_A_BLOCK * len(
            self.blocks
        )  # beyond its limits it would go on uncompiled, and only log that
        with config.patch(recompile_limit=most, accumulated_recompile_limit=2 * most):
            for block, call in self._compiled.items():
                block._compiled_call_impl = call
            try:
                yield
            finally:
                for block in self.blocks:
                    block._compiled_call_impl = None


def _check_compiler(device: str) -> None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError(
            "train.compile on a GPU needs Triton: pip install triton, or leave it out."
        )
    if device == "cpu":
        try:
            find_compiler()
        except KernelError as error:
            raise MissingDependencyError(f"train.compile needs a compiler of C++: {error}") from error
