"""Starts that are computed from data: run the frozen model on some batches, and make an adapter of what was seen.

Nothing of the model is changed by it. What comes out is an `AdapterState`; attach it with ``trainable=True``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.attach.attach import fresh_state
from lorakit.attach.observe import Run, add_gradients, kept_tokens, own_loss, run_on, see_inputs, undisturbed
from lorakit.attach.planning import Key, Plan, plan_method
from lorakit.core.adapter import AdapterState
from lorakit.core.method import Method
from lorakit.core.selection import Selector
from lorakit.core.target import Target
from lorakit.core.walk import uncompiled
from lorakit.errors import ConfigError, UnsupportedTargetError
from lorakit.methods.init import init_called
from lorakit.methods.init.eva import Components, share_out
from lorakit.methods.init.eva import eva as eva_factors
from lorakit.methods.init.lora_ga import Direction
from lorakit.methods.init.lora_ga import lora_ga as lora_ga_factors
from lorakit.methods.lora import SCALINGS, LoRA

Adapter = Method | Mapping[str, Method] | Mapping[Key, Method]


def eva(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Any],
    targets: Selector | None = None,
    *,
    exclude: Selector | None = None,
    rho: float = 2.0,
    tau: float = 0.99,
    analysis: Literal["pca", "svd"] = "pca",
    keep: Literal["scale", "alpha"] = "scale",
    ignored_label: int | None = -100,
    run: Run | None = None,
    seed: int | None = None,
) -> AdapterState:
    """An adapter that starts in the directions in which the inputs of its layers vary most (EVA).

        state = lk.eva(model, lk.LoRA(r=16, init="eva"), batches, targets="all-linear")
        lk.attach(model, state, trainable=True)

    Each layer has ``rho * r`` principal components of its inputs; of those of all layers together the ones that
    explain the largest shares of their layer's variance are taken, as many as the layers have ranks. So ranks move to
    the layers whose inputs need them; a layer may end with none and is then left out. ``B`` is zero: the model computes
    what it did.

    Layers that receive the same tensor, such as q, k and v, are computed once. The batches are gone through until every
    direction that is taken has settled, or to their end: which it was stands in ``spec.info["eva"]``.

    Args:
        model: The base model; adapters on it do not act meanwhile.
        adapter: A method whose `LoRA` has ``init="eva"`` (``DoRA(LoRA(init="eva"))`` too), or a mapping as for
            `attach`, in which other methods start as they always do.
        batches: What the model is run on: mappings of arguments, sequences of arguments, or single tensors.
        targets: See `attach`.
        exclude: See `attach`.
        rho: How many times its rank a layer may get. With 1 every layer keeps its rank.
        tau: A direction has settled when its cosine with itself before the last batch is at least this.
        analysis: ``"pca"`` takes the mean of the inputs out, as the authors' code does; ``"svd"`` does not.
        keep: What stays as it is where the rank changes: the ``"scale"`` (alpha is adjusted, as PEFT does it) or
            ``"alpha"`` (and the scale becomes ``alpha / rank``, as the authors' code does it).
        ignored_label: Tokens with this label are left out, where a batch has ``labels`` for each token; None takes
            them. Padding is left out in any case, by ``attention_mask``.
        run: Runs the model on a batch, for batches in another form.
        seed: Of the random projections.

    Returns:
        The adapter, ready to be attached.

    Raises:
        ConfigError: No method has ``init="eva"``, a setting makes no sense, or the batches hold too few tokens.
        UnsupportedTargetError: A target's inputs are not vectors that a hook can see.
        MergeError: Adapters are merged into the weights.
    """
    if not rho >= 1 or not 0 < tau <= 1:
        raise ConfigError(f"rho is at least 1 and tau in (0, 1]; got rho={rho!r}, tau={tau!r}.")
    if analysis not in ("pca", "svd") or keep not in ("scale", "alpha"):
        raise ConfigError(
            f"analysis is 'pca' or 'svd' and keep 'scale' or 'alpha'; got {analysis!r} and {keep!r}."
        )
    model = uncompiled(model)
    plan = plan_method(model, adapter, targets, exclude)
    loras = _loras(plan, "lorakit.eva", _why_no_vectors)
    most = {path: min(round(rho * lora.r), *_sides(plan[path][0])) for path, lora in loras.items()}
    unseen = {n: Components(n, centred=analysis == "pca") for n in most.values()}
    seen = {path: unseen[n] for path, n in most.items()}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    count, ranks, settled = 0, {path: lora.r for path, lora in loras.items()}, False
    run = run or run_on
    with undisturbed(model):
        for batch in batches:
            kept = kept_tokens(batch, ignored_label)
            see_inputs(model, {path: plan[path][0] for path in loras}, seen, batch, kept, run, generator)
            count += 1
            if all(c.directions is not None for c in seen.values()):
                ranks = share_out(
                    {path: c.ratios for path, c in seen.items()}, sum(r.r for r in loras.values())
                )
                if settled := all(c.settled(ranks[path], tau) for path, c in seen.items()):
                    break
    _check_seen(seen, loras, ranks, count)
    for path, lora in loras.items():
        target, method = plan[path]
        if r := ranks[path]:
            unit = SCALINGS[lora.scaling]
            alpha = lora.alpha if keep == "alpha" else lora.alpha * (unit(1.0, lora.r) / unit(1.0, r))
            target.measured = eva_factors(seen[path], target.out, r)
            plan[path] = target, _with_rank(method, r, alpha)
        else:
            del plan[path]
    info = {"eva": {"batches": count, "settled": settled, "rho": rho, "tau": tau, "analysis": analysis}}
    return fresh_state(model, plan, seed, info)


def lora_ga(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Any],
    targets: Selector | None = None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    exclude: Selector | None = None,
    gamma: float = 16.0,
    direction: Direction = "ArB2r",
    passes: int = 1,
    seed: int | None = None,
) -> AdapterState:
    """An adapter whose first step follows the gradient that full fine-tuning would follow (LoRA-GA).

        state = lk.lora_ga(model, lk.LoRA(r=8, alpha=16, scaling="rslora", init="lora_ga"), batches)
        lk.attach(model, state, trainable=True)

    The gradient of each weight is summed over the batches from the inputs and output gradients of its layer: the
    weights themselves need none, so a quantised base will do. The start is subtracted and not taken from the base,
    which stays as it is. The model runs in ``eval()``.

    Args:
        model: The base model; adapters on it do not act meanwhile.
        adapter: A method whose `LoRA` has ``init="lora_ga"``, or a mapping as for `attach`.
        batches: What the loss is computed on; the authors take 64 rows.
        targets: See `attach`.
        loss: The loss of a batch; by default what the model itself computes (``model(**batch).loss``).
        exclude: See `attach`.
        gamma: Larger values give a smaller start.
        direction: Which singular vectors of the gradient become ``A`` and ``B``, see `lorakit.methods.init.lora_ga`.
        passes: Go through the batches so many times, each time for a part of the targets: the gradients that are held
            at once are that much fewer.
        seed: Of the random projections.

    Returns:
        The adapter, ready to be attached.

    Raises:
        ConfigError: No method has ``init="lora_ga"``, a setting makes no sense, or a target gets no gradient.
        UnsupportedTargetError: A target's call cannot be hooked.
        MergeError: Adapters are merged into the weights.
    """
    if passes < 1:
        raise ConfigError(f"passes counts the passes over the batches; got {passes!r}.")
    model = uncompiled(model)
    plan = plan_method(model, adapter, targets, exclude)
    loras = _loras(plan, "lorakit.lora_ga", _why_no_gradient)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = batches if passes == 1 else list(batches)
    loss = loss or own_loss
    paths, count = list(loras), 0
    with undisturbed(model):
        for part in range(min(passes, len(paths))):
            chosen = {path: plan[path][0] for path in paths[part::passes]}
            gradients: dict[str, Tensor] = {}
            count = 0
            for batch in batches:
                add_gradients(model, chosen, gradients, batch, loss)
                count += 1
            for path, target in chosen.items():
                G = gradients.pop(path, None)
                if G is None or not torch.isfinite(G).all() or not G.any():
                    found = "none" if G is None or not G.any() else "a NaN or an infinity"
                    raise ConfigError(
                        f"LoRA-GA starts from the gradient of the weight of {path!r}, and there was {found} in {count} "
                        "batches: leave it out, or pass other batches or another loss."
                    )
                target.measured = lora_ga_factors(
                    G, loras[path].r, gamma=gamma, direction=direction, generator=generator
                )
    info = {"lora_ga": {"batches": count, "gamma": gamma, "direction": direction}}
    return fresh_state(model, plan, seed, info)


# ---- which targets
def _loras(plan: Plan, needs: str, why_not: Callable[[Target], str | None]) -> dict[str, LoRA]:
    """The LoRAs in a plan that start with what is measured here, by target."""
    loras = {
        path: lora
        for path, (_, method) in plan.items()
        if (lora := _innermost(method)) is not None and init_called(lora.init).needs == needs
    }
    if not loras:
        raise ConfigError(
            f"Nothing here starts from what {needs} measures: give it a LoRA(init={needs.removeprefix('lorakit.')!r})."
        )
    for path in loras:
        reason = why_not(plan[path][0])
        if reason is not None:
            raise UnsupportedTargetError(f"{needs} cannot start {path!r}: {reason}.")
    return loras


def _innermost(method: Method) -> LoRA | None:
    """The LoRA that a method is, or is wrapped around."""
    while not isinstance(method, LoRA):
        inner = getattr(method, "inner", None)
        if not isinstance(inner, Method):
            return None
        method = inner
    return method


def _with_rank(method: Method, r: int, alpha: float) -> Method:
    """A method with another rank and alpha in the LoRA inside."""
    if isinstance(method, LoRA):
        return dataclasses.replace(method, r=r, alpha=alpha)
    return dataclasses.replace(method, inner=_with_rank(method.inner, r, alpha))  # type: ignore[attr-defined, type-var]


def _why_no_vectors(target: Target) -> str | None:
    if target.shape.kind != "linear":
        return f"EVA looks at vectors that a layer multiplies by its weight, and this is an {target.shape.kind} target"
    return _why_no_gradient(target)


def _why_no_gradient(target: Target) -> str | None:
    if target.binding != "forward":
        return "its weight is read by another module, so no call of the layer shows its inputs"
    return None


def _sides(target: Target) -> tuple[int, int]:
    return target.out, target.in_


def _check_seen(
    seen: Mapping[str, Components], loras: Mapping[str, LoRA], ranks: Mapping[str, int], batches: int
) -> None:
    """Refuse what cannot give as many directions as there are ranks."""
    short = [path for path, components in seen.items() if components.count <= ranks[path]]
    wanted = sum(lora.r for lora in loras.values())
    if not short and sum(ranks.values()) == wanted:
        return
    path = next(iter(short), next(iter(seen)))
    raise ConfigError(
        f"EVA takes {wanted} directions from what {len(seen)} layers receive, and {batches} batches did not hold as "
        f"many: {path!r} saw {seen[path].count} vectors. Give it more or longer batches; only tokens count that are "
        "neither padding nor ignored by their label (ignored_label=None counts those too)."
    )
