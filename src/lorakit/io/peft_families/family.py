"""What reading and writing one of PEFT's types beside LoRA needs to know: a table of settings and a few rules.

PEFT's types have much in common: a target's tensors stand under ``<path>.<name>``, with the names that the methods here
have too; ``modules_to_save`` and the naming of targets are LoRA's. A `Family` says what is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.peft_config import PEFT_VERSION
from lorakit.io.peft_sites import Patterns

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}
"""The settings that all of PEFT's types have."""
COMMON_KEPT = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")

Facts = Mapping[str, Any]
"""A configuration with every key that the type has."""


class Family(ABC):
    """One of PEFT's types.

    Attributes:
        peft_type: Its word in ``adapter_config.json``.
        method: The method that it is here.
        defaults: Every setting, with the value that PEFT gives it.
        kept: Settings that change nothing in what is computed, given back on writing.
        refused: Settings that change what is computed in a way that lorakit has no method for, with the reason.
        names: The tensors of a target.
        shared: The tensors of all targets together; they stand under ``base_model.<name>``.
        kinds: The kinds of layer for which PEFT has the type.
        transposes: Whether PEFT has the type for transformers' ``Conv1D``.
        bias_word: What ``bias`` says when the biases of the adapted layers are trained; None without that setting.
    """

    peft_type: ClassVar[str]
    method: ClassVar[type[Method]]
    defaults: ClassVar[Mapping[str, Any]]
    kept: ClassVar[tuple[str, ...]] = COMMON_KEPT
    refused: ClassVar[Mapping[str, str]] = {}
    names: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    transposes: ClassVar[bool] = False
    bias_word: ClassVar[str | None] = None

    # ---- reading
    @abstractmethod
    def method_at(self, path: str, config: Facts, patterns: PathSettings) -> Method:
        """The method at one target."""

    @abstractmethod
    def shape_at(self, path: str, method: Method, group: Mapping[str, Tensor], known: Shape | None) -> Shape:
        """The facts of one target, from its tensors and what is ``known`` of it from the model.

        A size that the file does not say is 0.

        Raises:
            AdapterFileError: The tensors do not go together, or do not say enough.
        """

    def for_shape(self, method: Method, shape: Shape) -> Method:
        """A method with what PEFT does at a target of these sizes."""
        return method

    def start_shared(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The shared tensors when the file leaves them out.

        Raises:
            AdapterFileError: They cannot be made.
        """
        raise AdapterFileError(f"The file has none of the tensors {', '.join(self.shared)}.")

    def completed(self, method: Method, shared: Mapping[str, Tensor]) -> Method:
        """A method with the settings that the shared tensors give."""
        return method

    # ---- writing
    @abstractmethod
    def settings(
        self, methods: Mapping[str, Method], shapes: Mapping[str, Shape], hints: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The configuration of these targets, beside what names them."""

    def why_not(self, methods: Mapping[str, Method], shapes: Mapping[str, Shape]) -> list[str]:
        """What PEFT has no words for in these targets."""
        return []

    # ---- layout
    def in_file(
        self, method: Method, sizes: Mapping[str, tuple[int, ...]], shape: Shape
    ) -> dict[str, tuple[int, ...]]:
        """The sizes of a target's tensors in the file, from those in memory."""
        return dict(sizes)


class PathSettings:
    """Rank and alpha by path."""

    def __init__(self, config: Facts) -> None:
        self.ranks = Patterns(config.get("rank_pattern") or {}, config.get("r"))
        self.alphas = Patterns(config.get("alpha_pattern") or {}, config.get("alpha"))


def matrix(out: int, in_: int, known: Shape | None) -> Shape:
    """A linear layer, or the convolution that the model is known to have there: the file has its kernel unfolded."""
    if known is None or known.kind != "conv":
        return Shape("linear", out=out, in_=in_)
    return Shape("conv", out=out, in_=known.in_, kernel=known.kernel)


def one_value(what: str, values: Mapping[str, Any]) -> list[str]:
    """A reason when targets differ in what PEFT has once for all of them."""
    found = sorted(set(values.values()), key=str)
    return (
        [] if len(found) < 2 else [f"PEFT has one {what} for all targets of an adapter; this one has {found}"]
    )
