"""Saving a model's adapter and loading one onto a model: `lorakit.io` joined to `lorakit.attach`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.attach.attach import attach, state_of
from lorakit.attach.attachments import attachments_of, root_of
from lorakit.attach.report import AttachReport
from lorakit.core.adapter import AdapterState
from lorakit.core.walk import uncompiled
from lorakit.errors import AdapterNameError, listing
from lorakit.io.adapter_directory import Form, read, write
from lorakit.io.model_outline import outline_of
from lorakit.targets.recognise import parameter_target


def save(
    model: nn.Module | AdapterState,
    directory: str | PathLike[str],
    *,
    name: str | None = None,
    form: Form = "auto",
) -> Path:
    """Write an adapter to a directory, in the files that PEFT reads wherever PEFT has the method.

    The write is atomic: a full disk or a kill leaves the adapter that was there before.

    Args:
        model: A model with adapters, or an `AdapterState`.
        directory: Made if it does not exist.
        name: Which adapter of a model; may be left out when it has just one. A state is one adapter, and has no name.
        form: ``"auto"`` for PEFT's files where PEFT has the method; ``"native"`` for lorakit's own, which keep what
            only further training needs: the start of PiSSA, OLoRA and LoRA-GA.

    Returns:
        The directory.

    Raises:
        AdapterNameError: No adapter has that name, or there are several and none was named.
        NotAttachedError: The model carries no adapters.
    """
    if isinstance(model, AdapterState):
        return write(model, directory, form=form)
    names = list(attachments_of(model).adapters)
    if name is None:
        if len(names) > 1:
            raise AdapterNameError(
                f"This model carries several adapters: {listing(names)}. Say which: save(..., name=...)."
            )
        name = names[0]
    return write(state_of(model, name, copy=False), directory, outline=outline_of(root_of(model)), form=form)


def load(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    ignore: Collection[str] = (),
    prefer: Literal["config", "weights"] | None = None,
    initial: str | PathLike[str] | None = None,
) -> AttachReport:
    """Read an adapter, PEFT's or our own, and attach it: for inference, unless ``trainable``.

    Strict: every tensor of the file must have its place in the model and every place its tensor. The cost does not
    depend on how many adapters are attached already. An embedding table that PEFT saved along with an adapter of the
    embedding is left out where it equals the model's own, number for number.

    Args:
        model: The base model that the adapter was made for.
        directory: The adapter's directory (or a ``.safetensors`` file that carries its configuration).
        name: The name to attach it by.
        trainable: Whether its parameters require a gradient.
        freeze: Whether to switch off the base's ``requires_grad``, see `attach`.
        dtype: Convert the adapter; by default it keeps the dtype of the file.
        subfolder: PEFT puts every adapter but the one called ``"default"`` into a directory of its own name.
        allow_pickle: Also read a legacy ``.bin`` file (with ``weights_only``).
        ignore: See `lorakit.read`.
        prefer: See `lorakit.read`.
        initial: See `lorakit.read`.

    Raises:
        AdapterFileError: The file is missing, damaged, or holds something that cannot be honoured.
        AdapterMismatchError: It does not fit this model.
        AdapterNameError: The name is taken.
    """
    model = uncompiled(model)
    state = read(
        directory,
        name=subfolder,
        allow_pickle=allow_pickle,
        ignore=ignore,
        prefer=prefer,
        outline=partial(outline_of, model),
        initial=initial,
    )

    def table(path: str) -> Tensor | None:
        target = parameter_target(model, path)
        return None if target is None else target.stored.detach()

    state = without_repeated_tables(state, table)
    return attach(model, state, name=name, trainable=trainable, freeze=freeze, dtype=dtype)


def without_repeated_tables(state: AdapterState, table: Callable[[str], Tensor | None]) -> AdapterState:
    """Drop copies of an adapted embedding's table that say nothing new: PEFT writes one with each such adapter.

    Args:
        state: The adapter.
        table: The base's parameter of a path, or None.
    """
    repeated = set()
    for path, shape in state.spec.shapes.items():
        if not shape.lookup or f"{path}.weight" not in state.tensors:
            continue
        base = table(f"{path}.weight")
        (value,) = state.tensors[f"{path}.weight"].values()
        if base is not None and value.shape == base.shape and torch.equal(value.to(base), base):
            repeated.add(f"{path}.weight")
    if not repeated:
        return state
    spec = dataclasses.replace(
        state.spec,
        methods={path: method for path, method in state.spec.methods.items() if path not in repeated},
        shapes={path: shape for path, shape in state.spec.shapes.items() if path not in repeated},
    )
    tensors = {path: group for path, group in state.tensors.items() if path not in repeated}
    return AdapterState(spec, tensors, state.shared)
