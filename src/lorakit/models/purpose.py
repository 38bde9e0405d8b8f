"""What a saved adapter was trained for: the kind of model that it goes onto, and what its head tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError, listing
from lorakit.io import read
from lorakit.models.load import HEADED, Task

KIND_OF_TASK: dict[str, Task] = {
    "causal-lm": "causal-lm",
    "dpo": "causal-lm",
    "seq2seq": "seq2seq",
    "classification": "sequence-classification",
    "regression": "sequence-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "embedding": "feature-extraction",
}
"""A recipe's task, and the kind of model that it trains."""

_BY_PEFT: dict[str, Task] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_BY_CLASS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}


@dataclass(frozen=True)
class Purpose:
    """What an adapter says about the model that it goes onto.

    Attributes:
        kind: The kind of model; None where nothing is said.
        labels: What its head tells apart, in the order of the logits; None where it brings no head.
    """

    kind: Task | None = None
    labels: tuple[str, ...] | None = None

    @property
    def headed(self) -> bool:
        """Whether the adapter brings a head."""
        return self.labels is not None

    def __str__(self) -> str:
        if self.labels is None:
            return "brings no head" if self.kind is None else f"is for {self.kind} and brings no head"
        if len(self.labels) == 1:
            return "gives a number"
        return f"tells apart {listing(self.labels)}"


def purpose_in(info: Mapping[str, Any]) -> Purpose:
    """What `AdapterSpec.info` says: lorakit's word for the task, else PEFT's."""
    peft = info.get("peft")
    word = peft.get("task_type") if isinstance(peft, Mapping) else None
    kind = KIND_OF_TASK.get(str(info.get("task"))) or _BY_PEFT.get(str(word))
    labels = info.get("labels")
    headed = kind in HEADED and isinstance(labels, list)
    return Purpose(kind, tuple(map(str, labels)) if headed and labels else None)


def common_purpose(adapters: Sequence[str | Path]) -> Purpose:
    """What adapters are for that are to act on one model; one that says nothing goes along with the others.

    Raises:
        AdapterFileError: One cannot be read.
        ConfigError: They are for different heads, or different kinds of models.
    """
    found = [purpose_in(read(adapter).spec.info) for adapter in adapters]
    for adapter, one in zip(adapters[1:], found[1:], strict=True):
        known = one.kind is not None and found[0].kind is not None
        if one.labels != found[0].labels or (known and one.kind != found[0].kind):
            raise ConfigError(f"{adapters[0]} {found[0]}, and {adapter} {one}: these cannot be one model.")
    return next((one for one in found if one.kind is not None), found[0])


def kind_of_class(architectures: Sequence[str]) -> Task | None:
    """The kind of model that a class of transformers' is, by its name; None where that does not tell."""
    for name in architectures:
        for ending, kind in _BY_CLASS.items():
            if name.endswith(ending):
                return kind
    return None
