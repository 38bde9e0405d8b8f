"""Which tensors of a checkpoint adapters change, and how: told from the model on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.attach import attach
from lorakit.attach.fold import Change, bias_delta, same_changes
from lorakit.attach.planning import companions_of, plan_state
from lorakit.core.adapter import AdapterState
from lorakit.core.method import WeightMethod
from lorakit.core.target import Target
from lorakit.core.walk import base_modules, join
from lorakit.errors import MergeError, listing
from lorakit.io.model_files import without_repeated_tables
from lorakit.models.merge_source import MergeSource
from lorakit.models.stored_names import StoredNames

_LOADED = "Merge with the model loaded: lorakit merge MODEL ADAPTER."
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Place = tuple[int, str]  # a module's id, and the name of a parameter


class Job(NamedTuple):
    """One tensor to write.

    Attributes:
        origin: The tensor of the checkpoint that it is made from.
        changes: What is folded into it; nothing for a tensor that is only written once more.
        added: What is added on top, or None.
    """

    origin: str
    changes: Sequence[Change]
    added: Tensor | None = None


class MergePlan:
    """Collects the changes of adapters by the stored tensors that they act on.

    Attributes:
        model: On the meta device. Adapters are attached to it, without numbers, so that what cannot act together is
            refused as it is in memory.

    Args:
        source: The checkpoint.
        model: Its model.
    """

    def __init__(self, source: MergeSource, model: nn.Module) -> None:
        self.model, self._source = model, source
        self._names = StoredNames(model, source.keys())
        self._paths: dict[_Place, str] = {}
        self._uses: dict[int, list[_Place]] = {}  # of one parameter object, by its id
        for path, module in base_modules(model):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._paths[id(module), name] = join(path, name)
                    self._uses.setdefault(id(parameter), []).append((id(module), name))
        self._changes: dict[_Place, list[Change]] = {}
        self._count = 0

    def add(self, who: str, state: AdapterState, weight: float) -> None:
        """One more adapter.

        Args:
            who: What to call it in an error.
            state: The adapter.
            weight: A factor on its change.

        Raises:
            AdapterMismatchError: It does not fit the model.
            MergeError: It holds a NaN, or has no weight form.
        """
        bad = state.non_finite()
        if bad:
            raise MergeError(f"{who} holds a NaN or an infinity in {listing(bad, most=4)}.")
        state = without_repeated_tables(state, self._stored)
        plan = plan_state(self.model, state)
        companions = companions_of(self.model, plan)
        for path, target in (*((path, target) for path, (target, _) in plan.items()), *companions):
            method = plan[path][1]
            if not isinstance(method, WeightMethod):
                raise MergeError(
                    f"{who} uses {type(method).__name__} at {path or 'the model'!r}, which defines no weight and "
                    "cannot be merged."
                )
            place = id(target.module), target.parameter
            self._changes.setdefault(place, []).append(Change(target, method, state.parameters(path), weight))
        self._count += 1
        attach(self.model, state.to(device="meta"), name=f"adapter{self._count}", freeze=False)

    def jobs(self) -> tuple[dict[str, Job], bool]:
        """The tensors that differ from the checkpoint's, by name, and whether embedding and head must be untied.

        Raises:
            MergeError: Something is changed that is not in the checkpoint as it is in the model, or that has no place
                in one.
        """
        added = self._added_to_biases()
        acting = {place: self._changes.get(place, []) for place in (*self._changes, *added)}
        jobs: dict[str, Job] = {}
        untied = False
        for uses in self._uses.values():
            if not any(place in acting for place in uses):
                continue
            names = {place: self._names.find(self._paths[place]) for place in uses}
            known = [place for place in uses if names[place] is not None]
            if not known:
                raise MergeError(
                    f"The checkpoint has no tensor {self._paths[uses[0]]!r}: transformers makes it in loading, of "
                    f"others or from nothing. {_LOADED}"
                )
            first = next(place for place in uses if place in acting)
            alike = all(
                same_changes(acting.get(place, []), acting[first]) and place not in added for place in uses
            )
            if not alike and len(uses) > 1:
                self._check_tie(uses)
                untied = True
            for place in uses:
                name = names[place]
                if name is None and alike:
                    continue
                origin = name or names[known[0]]
                assert origin is not None
                own = name or self._names.invent(self._paths[place], origin, self._paths[known[0]])
                self._check_tensor(origin, place, acting.get(place, []))
                jobs[own] = Job(origin, acting.get(place, []), added.get(place))
        if untied:
            self._write_out_ties(jobs)
        return jobs, untied

    def _write_out_ties(self, jobs: dict[str, Job]) -> None:
        """The config's one word unties all: BERT's head has a bias under two names, which then need a tensor each."""
        for uses in self._uses.values():
            names = [self._names.find(self._paths[place]) for place in uses]
            origin = next((name for name in names if name is not None), None)
            if origin is None:
                continue
            beside = self._paths[uses[names.index(origin)]]
            for place, name in zip(uses, names, strict=True):
                own = name or self._names.invent(self._paths[place], origin, beside)
                if name is None and own not in jobs:
                    jobs[own] = Job(origin, [])

    def _stored(self, path: str) -> Tensor | None:
        name = self._names.find(path)
        return None if name is None else self._source[name]

    def _tied_to(self, place: _Place) -> list[str]:
        """The paths of the parameter at a place, its own first: of those that are one, the checkpoint may name any."""
        if place not in self._paths:
            return []
        uses = next(uses for uses in self._uses.values() if place in uses)
        return [self._paths[place], *(self._paths[use] for use in uses if use != place)]

    def _added_to_biases(self) -> dict[_Place, Tensor]:
        """What changes of weights add to the biases of their layers."""
        added: dict[_Place, Tensor] = {}
        for (module_id, parameter), changes in self._changes.items():
            if parameter == "bias":
                continue
            module, place = changes[0].target.module, (module_id, "bias")
            stored = next((t for path in self._tied_to(place) if (t := self._stored(path)) is not None), None)
            if stored is not None:  # a change may be a multiple of it, so it has to be more than a size
                module._parameters["bias"] = nn.Parameter(stored, requires_grad=False)
            name = self._names.find(self._paths[module_id, parameter])
            dtype = torch.float32 if name is None else self._source.dtype(name)
            extra = bias_delta(changes, dtype)
            if extra is None:
                continue
            if stored is None:
                raise MergeError(
                    f"{changes[0].target.path!r} has no bias in the checkpoint, and the adapter adds one: the config "
                    "has no word for it. Leave it beside the base."
                )
            added[place] = extra
        return added

    def _check_tie(self, uses: Sequence[_Place]) -> None:
        """Only embedding and head can be untied: for other ties a config has no word."""
        sides = [getattr(self.model, f"get_{side}_embeddings", None) for side in ("input", "output")]
        ends = {id(get()) for get in sides if callable(get)}
        if any(module not in ends or name != "weight" for module, name in uses):
            raise MergeError(
                f"{listing([self._paths[place] for place in uses])} are one tensor, and the adapters change only some "
                "of them, or change them differently: transformers would tie them again in loading."
            )

    def _check_tensor(self, origin: str, place: _Place, changes: Sequence[Change]) -> None:
        size, dtype = self._source.shape(origin), self._source.dtype(origin)
        target: Target | None = changes[0].target if changes else None
        want = tuple(target.stored.shape) if target is not None else size
        if size != want:
            raise MergeError(
                f"{origin!r} has the size {size} in the checkpoint; by the config {self._paths[place]!r} has {want}."
            )
        if dtype not in _DTYPES:
            raise MergeError(
                f"{origin!r} is stored as {dtype}, to which nothing can be added. Merge into a base that is not "
                "quantised."
            )
