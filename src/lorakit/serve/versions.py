"""What is served: an adapter's content as an immutable version, the names that lead to it, and a lease on it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.errors import InvalidAdapterIdError
from lorakit.io.safetensors_file import CODES, memory_of
from lorakit.models.chat_template import OwnTemplate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_ID = re.compile(rf"({_NAME.pattern})(?:@([1-9][0-9]{{0,8}}))?", re.ASCII)
_PLACES = ("base_model_name_or_path", "revision")  # where the base lay when the file was made: not content
_WORTH_A_HELPER = 1 << 20  # bytes; fewer are hashed sooner than a thread is there


@dataclass(eq=False)
class AdapterVersion:
    """The content of an adapter, in memory; it never changes.

    Two versions with the same digest compute the same. The object itself tells two stays in memory apart: what was
    evicted and read again is another object with the same digest.

    Attributes:
        digest: SHA-256 in hex over the methods, shapes, information, tensors and chat template: the identity. Paths
            and the name of the base are left out of it.
        state: The tensors on the host, contiguous, in the dtypes of the file.
        name: The first name that it was loaded under; for a mix ``"a:0.5+b:0.5"``.
        version: The number that it got under that name: 1, 2, ...
        bytes: Of all tensors.
        rank: The largest rank of any target; None where no method has one.
        source: Where it was read from.
        template: The chat template that it was trained with, where its files tell one.
    """

    digest: str
    state: AdapterState
    name: str
    version: int
    bytes: int
    rank: int | None
    source: str
    template: OwnTemplate | None = None

    def __repr__(self) -> str:
        return f"AdapterVersion({self.name}@{self.version}, {self.digest[:12]}, {self.bytes} bytes)"


class AdapterId(NamedTuple):
    """An adapter's name as a request gives it: ``name``, the newest version, or ``name@version``."""

    name: str
    version: int | None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


class Lease:
    """A reference to a version: as long as it is held, the version stays in memory, unchanged.

    Use it as a context manager, or call `release` when the request has ended.

    Attributes:
        version: The content.
        name: The name that it was asked for by.
        holder: Whose it is, in the words of who asked (a request's id).
    """

    __slots__ = ("_give_back", "holder", "name", "serial", "version")
    _serials = itertools.count(1)

    def __init__(
        self, version: AdapterVersion, give_back: Callable[[Lease], None], name: str, holder: str | None
    ) -> None:
        self.version, self.name, self.holder = version, name, holder
        self.serial = next(self._serials)
        self._give_back: Callable[[Lease], None] | None = give_back

    def release(self) -> None:
        """Give the reference back. Further calls do nothing."""
        give_back = self._give_back
        if give_back is not None:
            give_back(self)  # the store knows which leases are open, so two threads cannot both give it back

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease({self.name}, {self.version!r})"


def is_name(text: str) -> bool:
    """Whether an adapter may be called so."""
    return _NAME.fullmatch(text) is not None


def parse_name(name: object, *, param: str | None = "model") -> str:
    """A name without a version, as it is given to an adapter that is loaded.

    Raises:
        InvalidAdapterIdError: It has another form than a letter or digit and then up to 127 of ``A-Za-z0-9._-``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(name, param)
    return name


def parse_id(text: object, *, param: str | None = "model") -> AdapterId:
    """``name`` or ``name@version``.

    Raises:
        InvalidAdapterIdError: It has neither form.
    """
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise _invalid(text, param)
    return AdapterId(found[1], int(found[2]) if found[2] else None)


def make_version(
    state: AdapterState, name: str, version: int, source: str, template: OwnTemplate | None = None
) -> AdapterVersion:
    """A version of a state: detached, contiguous, and without memory that it does not need."""
    state = _compacted(state)
    return AdapterVersion(
        content_digest(state, template),
        state,
        name,
        version,
        state.nbytes,
        largest_rank(state),
        source,
        template,
    )


def content_digest(state: AdapterState, template: OwnTemplate | None = None) -> str:
    """SHA-256 in hex over what an adapter is: equal for equal content, whatever file or folder it lies in.

    Each tensor is hashed by itself, so that two threads can share the work. The template counts, since the same tensors
    answer otherwise to prompts that are rendered otherwise.
    """
    spec, ordered = state.spec, _ordered(state)
    described = {
        "methods": {path: method.to_json() for path, method in spec.methods.items()},
        "shapes": {path: vars(shape) for path, shape in spec.shapes.items()},
        "info": _without_places(spec.info),
        "tensors": [
            (path, name, CODES[tensor.dtype], tuple(tensor.shape), digest)
            for (path, name, tensor), digest in zip(
                ordered, _digests([t for _, _, t in ordered]), strict=True
            )
        ],
    }
    if template is not None:
        described["template"] = vars(template)
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=True, default=repr)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def mix_digest(parts: Mapping[str, float]) -> str:
    """The digest of a weighted mix, from its parts' digests and their weights."""
    text = json.dumps(["mix", sorted(parts.items())], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def largest_rank(state: AdapterState) -> int | None:
    """The largest rank of any target; None where no method has one."""
    ranks = [rank for path in state.spec.methods if (rank := rank_at(state, path)) is not None]
    return max(ranks, default=None)


def rank_at(state: AdapterState, path: str) -> int | None:
    """The rank at one target as its method says it, or None."""
    rank = getattr(state.spec.methods[path], "r", None)
    return rank if isinstance(rank, int) else None


def _digests(tensors: Sequence[Tensor]) -> list[str]:
    """SHA-256 in hex of each tensor's bytes."""
    digests = [""] * len(tensors)
    left = deque(range(len(tensors)))

    def work() -> None:
        while left:
            try:
                i = left.popleft()
            except IndexError:  # the other thread took the last one
                return
            digests[i] = _digest(tensors[i])

    helper = threading.Thread(target=work, name="adapter-digest", daemon=True)
    if sum(tensor.nbytes for tensor in tensors) >= _WORTH_A_HELPER:
        with contextlib.suppress(RuntimeError):  # no thread is to be had
            helper.start()
    work()
    if helper.ident is not None:
        helper.join()
    return [digest or _digest(tensor) for digest, tensor in zip(digests, tensors, strict=True)]


def _digest(tensor: Tensor) -> str:
    kept = tensor.detach().contiguous()  # alive for as long as its memory is in use
    return hashlib.sha256(memory_of(kept)).hexdigest()


def _ordered(state: AdapterState) -> Sequence[tuple[str, str, Tensor]]:
    return sorted(state.all_tensors(), key=lambda entry: entry[:2])


def _without_places(value: Any) -> Any:
    """Information without the places where a base lay."""
    if isinstance(value, Mapping):
        return {key: _without_places(v) for key, v in value.items() if key not in _PLACES}
    return [_without_places(v) for v in value] if isinstance(value, (list, tuple)) else value


def _compacted(state: AdapterState) -> AdapterState:
    """The same with contiguous tensors that together fill the memory that they keep alive.

    Paths and shapes are those of all adapters that have equal ones: at small ranks they would count beside the tensors.
    """
    used: dict[int, int] = {}
    size: dict[int, int] = {}
    for _, _, tensor in state.all_tensors():
        storage = tensor.untyped_storage()
        used[storage.data_ptr()] = used.get(storage.data_ptr(), 0) + tensor.numel() * tensor.element_size()
        size[storage.data_ptr()] = storage.nbytes()

    def compact(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach().cpu()
        if used[at] == size[at] and tensor.is_contiguous():
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    spec = state.spec
    methods = {sys.intern(path): method for path, method in spec.methods.items()}
    shapes = {sys.intern(path): _once(shape) for path, shape in spec.shapes.items()}
    tensors = {
        sys.intern(path): {sys.intern(name): compact(t) for name, t in group.items()}
        for path, group in state.tensors.items()
    }
    shared = {name: compact(t) for name, t in state.shared.items()}
    return AdapterState(AdapterSpec(methods, shapes, spec.base, spec.info), tensors, shared)


@functools.lru_cache(4096)
def _once(shape: Shape) -> Shape:
    """One object for all shapes that are equal."""
    return shape


def _invalid(name: object, param: str | None) -> InvalidAdapterIdError:
    shown = repr(name) if len(repr(name)) <= 100 else f"{repr(name)[:100]}..."
    return InvalidAdapterIdError(
        f"{shown} is no adapter's name. A name is a letter or a digit and then up to 127 letters, digits, dots, "
        "dashes or underscores; a version of it is written name@2.",
        param=param,
    )
