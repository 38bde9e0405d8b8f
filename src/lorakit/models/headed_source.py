"""A checkpoint of a body read as that of a model with a head, which an adapter brings: nothing of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.errors import MergeError, listing
from lorakit.io.safetensors_file import pieces_of
from lorakit.models.classifier import head_of, naming
from lorakit.models.load import load_tokenizer
from lorakit.models.merge_source import MergeSource
from lorakit.models.resolve import resolve
from lorakit.models.stored_names import StoredNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = ("num_labels", "_num_labels", "problem_type")  # which go by the labels


class HeadedSource(MergeSource):
    """The tensors of a checkpoint under the names of a model with another head.

    What the model has no place for, such as the head of a language model, is left out. Tensors that the checkpoint
    lacks (the head, BERT's pooler), or has for other labels, are zeros until an adapter replaces them.

    Attributes:
        new: The names of the latter.

    Args:
        source: The checkpoint.
        model: The model with its head, on the meta device.

    Raises:
        ModelError: The class of the model has no head.
        MergeError: The checkpoint holds the body under names that only loading understands.
    """

    def __init__(self, source: MergeSource, model: PreTrainedModel) -> None:
        self.path, self._source = source.path, source
        self.config: dict[str, Any] = {**source.config, "architectures": [type(model).__name__]}
        names = StoredNames(model, source.keys())
        tensors = model.state_dict(keep_vars=True)
        found = {name: names.find(name) for name in tensors}
        head = tuple(f"{path}." for path in head_of(model))
        self._stored = {
            name: stored
            for name, stored in found.items()
            if stored is not None
            and not (name.startswith(head) and source.shape(stored) != tuple(tensors[name].shape))
        }
        there = {id(tensors[name]) for name in self._stored}  # of ties the checkpoint holds one
        self.new = {name: tuple(t.shape) for name, t in sorted(tensors.items()) if id(t) not in there}
        body = f"{model.base_model_prefix}."
        renamed = [name for name in self.new if name.startswith(body) and ".pooler." not in name]
        if renamed:
            raise MergeError(
                f"The checkpoint has no {listing(renamed, most=4)} under that name: transformers makes it in loading. "
                "Merge with the model loaded: lorakit merge MODEL ADAPTER."
            )
        floating = (source.dtype(s) for s in self._stored.values() if source.dtype(s).is_floating_point)
        self._dtype = next(floating, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.new:
            return torch.zeros(self.new[name], dtype=self._dtype)
        return self._source[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self.new

    def __len__(self) -> int:
        return len(self._stored) + len(self.new)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.new[name] if name in self.new else self._source.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self.new else self._source.dtype(self._stored[name])

    def file(self, name: str) -> str | None:
        """New tensors go into the last file."""
        return self._source.file(
            next(reversed(self._stored.values())) if name in self.new else self._stored[name]
        )

    def pieces(self, name: str) -> Iterable[Any]:
        return pieces_of(self[name]) if name in self.new else self._source.pieces(self._stored[name])

    def write_settings(self, folder: Path) -> None:
        self._source.write_settings(folder)

    def write_config(self, folder: Path, *, dtype: str | None, untied: bool) -> None:
        self._source.write_config(folder, dtype=dtype, untied=untied)
        change_config(folder, {"architectures": self.config["architectures"]})

    def check_brought(self, whole: Iterable[str], weights: Sequence[float]) -> None:
        """Refuse a merge that would leave zeros, or a share of a head.

        Args:
            whole: The names of the tensors that adapters replace as a whole.
            weights: Of the adapters.

        Raises:
            MergeError: It would.
        """
        left = sorted(set(self.new) - set(whole))
        if left:
            raise MergeError(
                f"The checkpoint has no {listing(left, most=4)}, and the adapter does not bring it: the head would be "
                "zeros."
            )
        if self.new and list(weights) != [1.0]:
            raise MergeError(
                "Each of these adapters brings a head that the checkpoint has not, so there is nothing to measure a "
                "share of it from. Merge one of them, with weight 1; or with the model loaded: lorakit merge MODEL "
                "ADAPTER..."
            )


def name_labels(folder: Path, labels: Sequence[str], *, texts: bool) -> None:
    """Make the config in a folder that of a model which tells labels apart.

    Args:
        folder: With ``config.json`` and, of a model that reads texts, its tokenizer.
        labels: In the order of the logits; a single one is a number.
        texts: Whether whole texts are told apart: decoders then need to know the padding, which they look before.
    """
    values: dict[str, Any] = {**naming(labels), **dict.fromkeys(_SIZES)}
    if len(labels) == 1:
        values["problem_type"] = "regression"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if texts and config.get("pad_token_id") is None:
        tokenizer = load_tokenizer(resolve(folder))
        tokenizer.save_pretrained(folder)
        values["pad_token_id"] = tokenizer.pad_token_id
    change_config(folder, values)


def change_config(folder: Path, values: dict[str, Any]) -> None:
    """Change some values of ``config.json``; those that are None are taken out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in config.items() if key not in values or value is not None}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
