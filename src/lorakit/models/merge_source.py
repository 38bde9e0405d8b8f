"""A base model on the disk to be merged into: a folder with safetensors, or a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import MergeError, ModelError
from lorakit.io.checkpoint import Checkpoint
from lorakit.models.gguf_import import GgufModel
from lorakit.models.resolve import resolve

_CARRIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_LEFT_BEHIND = ("lorakit-manifest.json", "adapter_config.json")


class MergeSource(Mapping[str, Tensor]):
    """The tensors of a base, read one at a time, and the files beside them.

    Attributes:
        path: The folder or file.
        config: What its ``config.json`` says, or would say.
    """

    def __init__(self, path: Path, tensors: Checkpoint | GgufModel) -> None:
        self.path, self._tensors = path, tensors
        self.config: dict[str, Any] = dict(tensors.config)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The size of a tensor, without reading it."""
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        return self._tensors.dtype(name)

    def file(self, name: str) -> str | None:
        """The name of the safetensors file that a tensor is in; None where there is none."""
        return self._tensors.file(name)

    def pieces(self, name: str) -> Iterable[Any]:
        """The bytes of a tensor."""
        return self._tensors.pieces(name)

    def write_settings(self, folder: Path) -> None:
        """Write config, tokenizer and licence into a folder."""
        if isinstance(self._tensors, GgufModel):
            self._tensors.write_settings(folder)
            return
        for file in sorted(self.path.iterdir()):
            carried = file.suffix in _CARRIED and not file.name.endswith(".index.json")
            licence = file.name.upper().startswith(_LICENCES)
            if file.is_file() and (carried or licence) and file.name not in _LEFT_BEHIND:
                shutil.copyfile(file, folder / file.name)

    def write_config(self, folder: Path, *, dtype: str | None, untied: bool) -> None:
        """Change what is no longer so in the config that `write_settings` wrote.

        Args:
            folder: Where it is.
            dtype: The new dtype of all tensors, or None.
            untied: Whether embedding and head have become two tensors.
        """
        if dtype is None and not untied:
            return
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        if untied:
            config["tie_word_embeddings"] = False
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def merge_source(base: str | Path) -> MergeSource:
    """The base that a name means.

    Args:
        base: A folder, a built-in name, or a GGUF file.

    Raises:
        ModelError: There is none.
        MergeError: It is not on this disk, or quantised.
    """
    path = Path(base).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file. Name the folder that holds config.json and the weights.")
        return MergeSource(path, GgufModel(path))
    folder = resolve(base).path
    if folder is None:
        raise MergeError(
            f"{base} is a name on the hub. Download it (huggingface-cli download {base} --local-dir DIR) and name the "
            "folder, or merge with the model loaded: lorakit merge MODEL ADAPTER."
        )
    source = MergeSource(folder, Checkpoint(folder))
    if "quantization_config" in source.config:
        raise MergeError(
            f"{folder} is quantised: a change cannot be added to its codes one tensor at a time. Merge into the model "
            "that it was made from."
        )
    return source
