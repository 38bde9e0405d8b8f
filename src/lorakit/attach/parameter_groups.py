"""What an optimizer is given: every trainable parameter once, in groups by what it is to its method.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) trains the factor that starts at zero faster than the other one. That is no
method of its own: the model, its files and its cost are those of the method that it trains.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.attach.attach import trainable
from lorakit.attach.attachments import attachments_of
from lorakit.core.target import Target
from lorakit.errors import ConfigError, listing, near_matches

OFFICIAL = "official"
_NEVER_DECAYED = ("magnitude", "bias", "gain")


class _Part(NamedTuple):
    """What a parameter is: its role in its method, whether it is a vector, whether it adapts an embedding."""

    role: str = ""
    vector: bool = False
    lookup: bool = False


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    lora_plus_ratio: float = 16.0,
    weight_decay: float = 0.0,
    fast: Collection[str] = ("B",),
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: LoRA+, or with ``lora_plus_ratio=1`` one learning rate for all.

        optimizer = torch.optim.AdamW(lk.parameter_groups(model, lr=2e-4, lora_plus_ratio=16, weight_decay=0.01))

    Every parameter that requires a gradient stands in exactly one group. What is fast is said by role and by nothing
    else: magnitudes, biases, vectors and heads are trained at ``lr`` unless their role is in ``fast``. Schedulers scale
    all groups alike, so the ratio holds in every step.

    Args:
        model: A model with adapters.
        lr: The learning rate of everything that is not fast: LoRA's ``A``, heads, magnitudes.
        lora_plus_ratio: The learning rate of what is fast, divided by ``lr``; the paper's lambda.
        weight_decay: Of matrices. Vectors (biases, norms and copies of them), magnitudes and trained biases have none,
            as in transformers' ``Trainer``.
        fast: Roles of the fast parameters: ``"B"``, ``"A"``, ``"magnitude"``, ``"bias"``, ``"copy"`` or another role
            that a method on this model gives. ``"official"`` is the rule of the authors' code, which PEFT has too:
            ``B`` and every vector, whatever it is.
        embedding_lr: Of the ``A`` and ``B`` of adapted embeddings; by default they are treated like any other. The
            authors' code, and PEFT, take 1e-6.

    Returns:
        One dictionary a group, the slow ones first: ``params``, ``lr``, ``weight_decay``, and its ``name``.

    Raises:
        ConfigError: A number makes no sense, nothing is trainable, or no parameter has a role of ``fast``.
        NotAttachedError: The model carries no adapters.
    """
    for what, value in (("lr", lr), ("lora_plus_ratio", lora_plus_ratio), ("embedding_lr", embedding_lr)):
        if value is not None and not (value > 0 and value < float("inf")):
            raise ConfigError(f"{what} must be a positive number; got {value!r}.")
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay must be at least 0; got {weight_decay!r}.")
    named = trainable(model)
    if not named:
        raise ConfigError("No parameter of the model requires a gradient, so there is nothing to optimize.")
    parts = _parts(model)
    here = {id(p): parts.get(id(p), _Part(vector=p.dim() < 2)) for p in named.values()}
    roles = (fast,) if isinstance(fast, str) else tuple(fast)
    if lora_plus_ratio != 1:
        _check_roles(roles, {part.role for part in here.values()} - {""})
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for parameter in named.values():
        part = here[id(parameter)]
        if embedding_lr is not None and part.lookup and part.role in ("A", "B"):
            kind, rate = "embedding", embedding_lr
        elif part.role in roles or (OFFICIAL in roles and (part.role == "B" or part.vector)):
            kind, rate = "fast", lr * lora_plus_ratio
        else:
            kind, rate = "slow", lr
        decayed = weight_decay > 0 and not part.vector and part.role not in _NEVER_DECAYED
        groups.setdefault((rate, weight_decay if decayed else 0.0, kind), []).append(parameter)
    order = ("slow", "embedding", "fast")
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "name": kind if decay else f"{kind}, no decay"}
        for (rate, decay, kind), params in sorted(groups.items(), key=lambda item: order.index(item[0][2]))
    ]


def _parts(model: nn.Module) -> dict[int, _Part]:
    """What each adapter's parameters are, by identity.

    Raises:
        ConfigError: One parameter has two roles, so that no group would be right.
    """
    attachments = attachments_of(model)
    parts: dict[int, _Part] = {}
    for name in attachments.adapters:
        slots = attachments.adapter(name).slots
        for path, adapter in attachments.parameters_of(name):
            target = slots[path].target
            for key, parameter in adapter._parameters.items():
                if parameter is None:
                    continue
                part = _part(adapter.method.roles.get(key, ""), parameter, target)
                known = parts.setdefault(id(parameter), part)
                if known.role != part.role:
                    raise ConfigError(
                        f"The parameter {key!r} at {path!r} is shared, once as {known.role!r} and once as "
                        f"{part.role!r}: it cannot have two learning rates."
                    )
    return parts


def _part(role: str, parameter: Tensor, target: Target) -> _Part:
    copy_of_vector = role == "copy" and target.shape.kind == "parameter" and len(target.shape.stored) < 2
    return _Part(role, parameter.dim() < 2 or copy_of_vector, target.shape.lookup)


def _check_roles(asked: tuple[str, ...], here: set[str]) -> None:
    for role in asked:
        if role != OFFICIAL and role not in here:
            raise ConfigError(
                f"No trainable parameter has the role {role!r}, so none would be fast."
                f"{near_matches(role, here)} Roles here: {listing(sorted(here)) or 'none'}."
            )
    if not asked:
        raise ConfigError(
            "fast names no role: nothing would be fast. Give fast=('B',), or lora_plus_ratio=1."
        )
