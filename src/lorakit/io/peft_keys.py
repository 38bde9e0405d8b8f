"""Taking apart the keys of a PEFT file: which module, which tensor of it, under which of the forms in use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from lorakit.errors import AdapterFileError, listing
from lorakit.io.peft_rules import PREFIX, TOKEN_ROWS_KEY

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_ROWS = re.compile(rf"(.+)\.{re.escape(TOKEN_ROWS_KEY)}(?:\.([^.]+))?")
_WRAPPED = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module)(?=\.)")


@dataclass(frozen=True)
class Found:
    """One tensor of the file with the key it stood under."""

    key: str
    tensor: Tensor


@dataclass
class Keys:
    """A file's tensors by what they are.

    Attributes:
        factors: PEFT's module path to ``lora_A``, ``lora_B``, ``lora_bias``, ``embedding_A``, ``embedding_B``,
            ``magnitude``.
        rows: Path of an embedding to its token rows.
        others: Everything else, by key without prefix: whole parameters.
        adapters: Adapter names that stood in keys.
    """

    factors: dict[str, dict[str, Found]] = field(default_factory=dict)
    rows: dict[str, Found] = field(default_factory=dict)
    others: dict[str, Found] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)

    def add(self, key: str, bare: str, tensor: Tensor) -> None:
        """Put one tensor where it belongs."""
        found = Found(key, tensor)
        adapter: str | None = None
        if match := _FACTOR.fullmatch(bare):
            path, letter, adapter, leaf = match.groups()
            name = "lora_bias" if leaf == "bias" and letter == "B" else f"lora_{letter}"
            if leaf == "bias" and letter == "A":
                name = "lora_A.bias"  # no such thing: left over, and reported
            self.put(path, name, found)
        elif match := _EMBEDDING.fullmatch(bare):
            path, letter, adapter = match.groups()
            self.put(path, f"embedding_{letter}", found)
        elif match := _MAGNITUDE.fullmatch(bare):
            path, adapter = match.groups()
            self.put(path, "magnitude", found)
        elif match := _ROWS.fullmatch(bare):
            path, adapter = match.groups()
            _put(self.rows, path, found)
        else:
            self.put_other(bare, found)
        if adapter is not None:
            self.adapters.add(adapter)

    def put(self, path: str, name: str, found: Found) -> None:
        """Note a tensor of a target."""
        _put(self.factors.setdefault(path, {}), name, found)

    def put_other(self, bare: str, found: Found) -> None:
        """Note a tensor that is none of a target's."""
        _put(self.others, bare, found)

    def check_one_adapter(self) -> None:
        """Raise `AdapterFileError` if keys name several adapters."""
        if len(self.adapters) > 1:
            raise AdapterFileError(
                f"The file holds several adapters: {listing(sorted(self.adapters))}. Save each on its own with "
                "PEFT's save_pretrained."
            )


def _put(group: dict[str, Found], name: str, found: Found) -> None:
    if name in group:
        raise AdapterFileError(f"The file has one tensor twice: as {group[name].key!r} and as {found.key!r}.")
    group[name] = found


def sort_keys(tensors: Iterable[tuple[str, Tensor]]) -> Keys:
    """Group the tensors of a LoRA file; prefixes, adapter names and the parts that wrappers insert are taken off.

    Raises:
        AdapterFileError: Some keys have PEFT's prefix and others not, two adapters are in one file, or two keys
            mean one tensor.
    """
    keys = Keys()
    for key, bare, tensor in bare_keys(tensors):
        keys.add(key, bare, tensor)
    keys.check_one_adapter()
    return keys


def bare_keys(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str, Tensor]]:
    """A file's tensors as (key, key without PEFT's prefix and without the parts that wrappers insert, tensor).

    Raises:
        AdapterFileError: Some keys have PEFT's prefix and others not.
    """
    items = [(key, _WRAPPED.sub("", "." + key)[1:], tensor) for key, tensor in tensors]
    prefixed = sum(bare.startswith(PREFIX) for _, bare, _ in items)
    if prefixed and prefixed < len(items):
        without = [key for key, bare, _ in items if not bare.startswith(PREFIX)]
        raise AdapterFileError(
            f"{prefixed} keys of the file start with {PREFIX!r} and {len(without)} do not: "
            f"{listing(without)}. They come from "
            "different models or tools."
        )
    return [(key, bare[len(PREFIX) :] if prefixed else bare, tensor) for key, bare, tensor in items]
