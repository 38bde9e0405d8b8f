"""What is attached, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.attach.attachments import Attachments, attachments_of
from lorakit.core.method import LowRankMethod
from lorakit.targets.counting import base_numel


@dataclass(frozen=True)
class SiteReport:
    """One adapter at one target.

    Attributes:
        path: Where.
        kind: Kind of target.
        size: Size of its weight, as text.
        method: The method's name.
        rank: The rank of a low-rank method, else None.
        parameters: Numbers in the adapter's tensors here.
        trainable: Those of them that require a gradient.
        ran: Whether a forward pass has reached this layer since it was attached.
        binding: ``forward`` or ``parameter``.
    """

    path: str
    kind: str
    size: str
    method: str
    rank: int | None
    parameters: int
    trainable: int
    ran: bool
    binding: str


@dataclass(frozen=True)
class AttachReport:
    """What `attach` or `load` did.

    Attributes:
        name: The adapter.
        sites: Where it is.
        base_parameters: Numbers in the base model, tied weights once.
        active: The adapters that act by default now.
        shared: Numbers in the tensors that all targets share.
        shared_trainable: Those of them that require a gradient.
    """

    name: str
    sites: tuple[SiteReport, ...]
    base_parameters: int
    active: tuple[str, ...]
    shared: int = 0
    shared_trainable: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in the adapter."""
        return self.shared + sum(site.parameters for site in self.sites)

    @property
    def trainable(self) -> int:
        """Numbers that require a gradient."""
        return self.shared_trainable + sum(site.trainable for site in self.sites)

    def __str__(self) -> str:
        share = 100 * self.parameters / max(1, self.base_parameters)
        lines = [
            f"Adapter {self.name!r}: {len(self.sites)} targets, {self.parameters:,} parameters "
            f"({share:.3f} % of the base's {self.base_parameters:,}), {self.trainable:,} trainable",
            *_table(self.sites),
        ]
        if self.shared:
            lines.append(f"  shared by all targets: {self.shared:,}")
        if self.name not in self.active:
            acting = ", ".join(self.active) or "none (the base model)"
            lines.append(
                f"Active: {acting}. Run this one with lorakit.use(model, {self.name!r}) or set_active."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelReport:
    """The state of a model's adapters.

    Attributes:
        adapters: A report for each adapter.
        active: What acts by default, as ``{name: weight}``.
        merged: What is folded into the weights, as ``{name: weight}``.
        never_ran: Targets that no forward pass has reached since they were attached (a compiled model does not say).
    """

    adapters: tuple[AttachReport, ...]
    active: dict[str, float]
    merged: dict[str, float]
    never_ran: tuple[str, ...]

    def __str__(self) -> str:
        lines = [str(adapter) for adapter in self.adapters]
        lines.append(f"Active: {_words(self.active)}. Merged: {_words(self.merged)}.")
        if self.never_ran:
            lines.append(
                f"Never ran ({len(self.never_ran)}): "
                f"{', '.join(self.never_ran[:8])}{' ...' if len(self.never_ran) > 8 else ''}"
            )
        return "\n".join(lines)


def report(model: nn.Module) -> ModelReport:
    """Targets, shapes, counts, what is merged, and what never ran; print it.

    Raises:
        NotAttachedError: The model carries no adapters.
    """
    attachments = attachments_of(model)
    base = base_numel(model)
    return ModelReport(
        tuple(attach_report(attachments, name, base) for name in attachments.adapters),
        dict(attachments.routing.default.weights),
        dict(attachments.routing.merged.weights),
        tuple(slot.target.path for slot in attachments.slots if not slot.ran),
    )


def attach_report(attachments: Attachments, name: str, base: int) -> AttachReport:
    """The report on one adapter, of a model with ``base`` numbers."""
    sites = []
    shared: dict[str, nn.Parameter] = {}
    attached = attachments.adapter(name)
    for path, slot in attached.slots.items():
        adapter = slot.adapter(name)
        assert adapter is not None
        method = adapter.method
        common = method.shared_shapes()
        parameters = [p for key, p in adapter._parameters.items() if p is not None and key not in common]
        shared |= {key: p for key in common if (p := adapter._parameters[key]) is not None}
        inner = getattr(method, "inner", method)
        sites.append(
            SiteReport(
                path,
                slot.target.shape.kind,
                str(slot.target.shape),
                method.name,
                getattr(inner, "r", None) if isinstance(inner, LowRankMethod) else None,
                sum([p.numel() for p in parameters]),
                sum([p.numel() for p in parameters if p.requires_grad]),
                slot.ran,
                slot.target.binding,
            )
        )
    return AttachReport(
        name,
        tuple(sites),
        base,
        attachments.routing.default.names,
        sum(p.numel() for p in shared.values()),
        sum(p.numel() for p in shared.values() if p.requires_grad),
    )


def _table(sites: tuple[SiteReport, ...]) -> list[str]:
    """One line for each kind of site: the last part of the path, the size, the method, the rank."""
    groups: dict[tuple[str, str, str, str], list[SiteReport]] = {}
    for site in sites:
        rank = "" if site.rank is None else f"r={site.rank}"
        how = " (weight-bound)" if site.binding == "parameter" else ""
        last = site.path.rsplit(".", 1)[-1] or "(model)"
        groups.setdefault((last + how, site.size, site.method, rank), []).append(site)
    rows = [(f"{len(g)} x", *key, f"{sum(s.parameters for s in g):,}") for key, g in groups.items()]
    return table_of(rows)


def table_of(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the cells of each row under those of the row before; the last one, a number, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i < len(row) - 1 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _words(mix: dict[str, float]) -> str:
    return " + ".join(n if w == 1 else f"{w:g} * {n}" for n, w in mix.items()) or "none"
