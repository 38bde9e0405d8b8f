"""Folding adapters into their base and saving what comes out as an ordinary model, with proof that it is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.attach import merge, use
from lorakit.errors import MergeError
from lorakit.io import read
from lorakit.io.model_files import load
from lorakit.models import (
    ResolvedModel,
    has_encoder_and_decoder,
    load_classifier,
    load_model,
    load_tokenizer,
)
from lorakit.models.chat_template import adopt_common_template
from lorakit.models.image_classifier import (
    find_image_model,
    image_input,
    load_image_classifier,
    normalisation_file,
)
from lorakit.models.load import HEADED, Task
from lorakit.models.new_folder import check_new, new_folder
from lorakit.models.purpose import Purpose, common_purpose, kind_of_class
from lorakit.models.streaming_merge import check_mergeable, weights_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_TOKENS = 64
_PROBE_SIDE = 32  # pixels, of models that take images of any size


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk.

    An output is a logit; of a model without a head, an entry of the last hidden states.

    Attributes:
        folder: Where it is.
        merged_difference: Largest difference of an output, adapters merged against adapters beside the base.
        saved_difference: The same for the model read back from the folder.
        largest_logit: The largest output of the unmerged model, to compare with.
        adapter_effect: Largest difference of an output that the adapters make to the base.
        bytes: Size of the folder.
    """

    folder: Path
    merged_difference: float
    saved_difference: float
    largest_logit: float
    adapter_effect: float
    bytes: int


def merge_to_folder(
    model: str,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> MergeResult:
    """Merge adapters into a base model and save it, as transformers saves any model, with what reads its inputs.

    The folder appears whole or not at all. What was saved is read back and run beside the unmerged model. An adapter
    that `lorakit train` made gives a model for its task: a classifier of texts, words or images has its head and the
    names of its labels. A ResNet's file of weights gives a folder with a file of that name.

    Args:
        model: The base: a folder, a built-in name or a hub id; for images also a ResNet's file of weights.
        adapters: Folders; several are added up.
        out: Where to save; must be new or empty.
        weights: One for each adapter; 1 by default.
        dtype: To load, merge and save in.
        overwrite: Replace what is in ``out``.

    Raises:
        ConfigError: ``out`` is in use, the numbers of adapters and weights differ, or the adapters are for different
            heads.
        AdapterFileError: An adapter cannot be read, or belongs to another model.
        MergeError: An adapter has no weight form or holds a NaN, or the saved model does not compute the same.
        ModelError: The base cannot be found or read, or is no model for what the adapters were trained for.
    """
    out = Path(out)
    weights = weights_for(adapters, weights)
    check_new(out, list(map(Path, adapters)), overwrite=overwrite)
    for adapter in adapters:
        check_mergeable(str(adapter), read(adapter))
    base = _Base.of(model, common_purpose(adapters), dtype)
    inputs = [*map(Path, adapters), *([] if base.path is None else [base.path])]
    check_new(out, inputs, overwrite=overwrite)
    tokenizer = base.tokenizer()
    loaded = base.load()
    if tokenizer is not None:
        adopt_common_template(adapters, tokenizer)
    mix = {f"adapter{i}": weight for i, weight in enumerate(weights)}
    for name, adapter in zip(mix, adapters, strict=True):
        load(loaded, adapter, name=name)
    probe = _probe(loaded, base.kind, tokenizer)
    with use(loaded, None):
        alone = _outputs(loaded, probe)
    with use(loaded, mix):
        beside = _outputs(loaded, probe)
    merge(loaded, mix, permanent=True)
    merged_difference = _difference(_outputs(loaded, probe), beside)
    kept, where = next(loaded.parameters()).dtype, loaded.device
    with new_folder(out, inputs, overwrite=overwrite) as part:
        base.save(loaded, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        del loaded
        again = base.saved_in(part).load(where)
        saved_difference = _difference(_outputs(again, probe), beside)
        largest = float(beside.abs().max())
        _check(saved_difference, largest, kept)
        del again
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return MergeResult(out, merged_difference, saved_difference, largest, _difference(alone, beside), size)


@dataclass(frozen=True)
class _Base:
    """A base model, and how it is read and saved.

    Attributes:
        found: Where it is: the path of a ResNet's file of weights, or a model of transformers'.
        kind: What it is for.
        labels: What the head tells apart that the adapters bring; None where the base has what it needs.
        dtype: To load it in.
    """

    found: ResolvedModel | str
    kind: Task
    labels: tuple[str, ...] | None
    dtype: str

    @classmethod
    def of(cls, name: str, purpose: Purpose, dtype: str) -> _Base:
        """The base of that name, as what the adapters were trained for; where they do not say, as what it is."""
        found = find_image_model(name)
        if isinstance(found, str):
            return cls(found, "image-classification", purpose.labels, dtype)
        kind = purpose.kind
        if kind is None and has_encoder_and_decoder(found):
            kind = "seq2seq"
        return cls(found, kind or kind_of_class(found.architectures) or "causal-lm", purpose.labels, dtype)

    @property
    def path(self) -> Path | None:
        """The folder or file, where it is on this disk."""
        return Path(self.found) if isinstance(self.found, str) else self.found.path

    def saved_in(self, folder: Path) -> _Base:
        """The same kind of model in another folder."""
        file = folder / Path(self.found).name if isinstance(self.found, str) else folder
        return _Base(find_image_model(str(file)), self.kind, self.labels, self.dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's; None where nothing is text."""
        return (
            None
            if isinstance(self.found, str) or self.kind == "image-classification"
            else load_tokenizer(self.found)
        )

    def load(self, device: torch.device | None = None) -> Any:
        """The model in ``eval()``."""
        if self.kind == "image-classification":
            where = None if device is None else str(device)
            return load_image_classifier(self.found, self.labels, dtype=self.dtype, device=where).model
        assert not isinstance(self.found, str)
        if self.kind in HEADED:
            made = load_classifier(self.found, self.labels, task=self.kind, dtype=self.dtype, device=device)
            return made.model
        return load_model(self.found, task=self.kind, dtype=self.dtype, device=device)

    def save(self, model: Any, folder: Path) -> None:
        """Write a model of this kind, and how its images are to be normalised where the base says so."""
        if isinstance(self.found, str):
            told = {} if self.labels is None else {"labels": json.dumps(self.labels)}
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(tensors, folder / Path(self.found).name, {"format": "pt", **told})
            return
        model.save_pretrained(folder)
        settings = normalisation_file(self.found) if self.kind == "image-classification" else None
        if settings is not None:
            (folder / settings.name).write_bytes(settings.read_bytes())


def _probe(model: Any, kind: Task, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
    """One input of random numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)
    if tokenizer is None:
        wants = image_input(model)
        side = wants.size or _PROBE_SIDE
        pixels = torch.randn(1, wants.channels, side, side, generator=generator)
        return {"pixel_values": pixels.to(model.device, next(model.parameters()).dtype)}
    most = getattr(model.config, "max_position_embeddings", None)
    length = min(_PROBE_TOKENS, most // 2) if isinstance(most, int) and most > 1 else _PROBE_TOKENS
    ids = torch.randint(len(tokenizer), (1, length), generator=generator).to(model.device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "seq2seq" else {})}


def _outputs(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Logits; of a model without a head, the last hidden states."""
    with torch.no_grad():
        said = model(**probe)
    found: Tensor = said.logits if hasattr(said, "logits") else said.last_hidden_state
    return found.float()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _check(difference: float, largest: float, dtype: torch.dtype) -> None:
    """A merged weight is rounded once to the model's dtype; more than what that can do is a fault."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)
    if not difference <= tolerance * max(1.0, largest):
        raise MergeError(
            f"The saved model differs from the unmerged one by up to {difference:.2e} in an output (largest output "
            f"{largest:.1f}); nothing was kept. Please report this with the name of the model and the adapter's "
            "adapter_config.json."
        )
