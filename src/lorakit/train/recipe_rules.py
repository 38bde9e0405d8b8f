"""Settings of a recipe that are sound alone and make no sense together: each rule says why, and what to do.

Nothing that a recipe sets is ignored in silence: a setting that could not have an effect is a mistake too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core import Method
from lorakit.errors import ConfigError, listing

if TYPE_CHECKING:
    from lorakit.train.recipe import Recipe

Rule = Callable[["Recipe"], "str | None"]

_MEASURED_STARTS = ("eva", "lora_ga")
_ONE_TEXT_A_ROW = ("causal-lm", "classification", "regression", "token-classification")
_WITH_A_HEAD = ("classification", "regression", "token-classification", "image-classification")


def check_rules(recipe: Recipe) -> None:
    """Look at all settings together.

    Raises:
        ConfigError: All that is wrong, a line each.
    """
    found = list(broken_rules(recipe))
    if found:
        raise ConfigError("\n    ".join(found))


def broken_rules(recipe: Recipe) -> Iterator[str]:
    """The messages of the rules that a recipe breaks."""
    for rule in RULES:
        message = rule(recipe)
        if message is not None:
            yield message


def _warmup_ends_before_the_run(recipe: Recipe) -> str | None:
    train = recipe.train
    if train.max_steps is None or train.warmup < 1 or train.warmup < train.max_steps:
        return None
    return (
        f"train.warmup is {train.warmup:g} steps and train.max_steps {train.max_steps}, so the rate would never reach "
        "train.lr: make the warm-up shorter, or a share of the run such as 0.03."
    )


def _measuring_needs_a_valid_split(recipe: Recipe) -> str | None:
    if recipe.train.eval_every is None or any(getattr(part.data, "valid", None) for part in recipe.parts()):
        return None
    return (
        "train.eval_every measures on the valid split, and there is none: name data.valid, or leave "
        "train.eval_every out."
    )


def _patience_needs_measurements(recipe: Recipe) -> str | None:
    if recipe.train.patience is None or recipe.train.eval_every is not None:
        return None
    return "train.patience counts measurements on the valid split: say how often, with train.eval_every."


def _patience_needs_a_measure(recipe: Recipe) -> str | None:
    if recipe.train.patience is None or recipe.train.keep_best != "none":
        return None
    return (
        "train.patience waits for a better train.keep_best, which is none: leave train.keep_best at auto, or name "
        "what is measured, such as valid_loss."
    )


def _improvement_needs_patience(recipe: Recipe) -> str | None:
    if not recipe.train.min_improvement or recipe.train.patience is not None:
        return None
    return "train.min_improvement says what counts for train.patience, which is not set: set it, such as 3."


def _best_needs_measurements(recipe: Recipe) -> str | None:
    best = recipe.train.keep_best
    if best in ("auto", "none") or recipe.train.eval_every is not None:
        return None
    return (
        f"train.keep_best is {best}, which is measured at the end only, where the last adapter is the best: set "
        "train.eval_every too."
    )


def _drawing_needs_a_temperature(recipe: Recipe) -> str | None:
    generate = recipe.generate
    if generate.temperature > 0 or (generate.top_p == 1 and generate.top_k == 0):
        return None
    which = "top_p" if generate.top_p != 1 else "top_k"
    return (
        f"generate.{which} says what is drawn from, but at generate.temperature 0 nothing is drawn: set a temperature "
        f"such as 0.7, or leave {which} out."
    )


def _start_batches_need_a_measured_start(recipe: Recipe) -> str | None:
    for part in recipe.parts():
        section = part.adapter
        if section.start_batches == type(section).model_fields["start_batches"].default:
            continue
        starts = {start for method in part.adapter.methods() if (start := _start(method)) is not None}
        if not starts & set(_MEASURED_STARTS):
            return (
                f"adapter.start_batches is for the starts {listing(_MEASURED_STARTS)}; here the start is "
                f"{listing(sorted(starts)) or 'none'}: set adapter.init, or leave start_batches out."
            )
    return None


def _fast_roles_exist(recipe: Recipe) -> str | None:
    train = recipe.train
    if train.lora_plus_ratio == 1 or "official" in train.fast:
        return None
    roles = {role for method in recipe.adapter.methods() for role in method.roles.values()}
    # These train a head whole, beside whatever the adapter is.
    roles |= {"copy"} if recipe.task in _WITH_A_HEAD else set()
    missing = [role for role in train.fast if role not in roles]
    if not missing:
        return None
    return (
        f"train.lora_plus_ratio makes {listing(missing)} faster, and no method of the adapter has that: say which of "
        f"{listing(sorted(roles)) or '(none)'} in train.fast, or leave lora_plus_ratio out."
    )


def _output_apart_from_the_model(recipe: Recipe) -> str | None:
    model = Path(recipe.model.name).expanduser()
    if not model.is_dir() or recipe.output.resolve() != model.resolve():
        return None
    return f"output is the model's own folder, {recipe.output}: name another, such as runs/{model.name}."


def _frozen_cache_knows_the_task(recipe: Recipe) -> str | None:
    if recipe.train.cache_frozen == "none" or recipe.task in _ONE_TEXT_A_ROW:
        return None
    return (
        f"train.cache_frozen is for rows of one text, task: {listing(_ONE_TEXT_A_ROW)}; with task: {recipe.task} leave "
        "it out."
    )


def _the_compiler_knows_one_route(recipe: Recipe) -> str | None:
    if not recipe.train.compile or recipe.adapters is None:
        return None
    return (
        "train.compile would compile every block anew for each mix of adapters in a batch: train the adapters one by "
        "one, or leave it out."
    )


def _the_compiler_does_not_checkpoint(recipe: Recipe) -> str | None:
    if not recipe.train.compile or not recipe.train.activation_checkpointing:
        return None
    return (
        "train.compile cannot compile what train.activation_checkpointing runs again with the adapters of that step: "
        "choose one of them."
    )


def _one_of_cache_and_compiler(recipe: Recipe) -> str | None:
    if recipe.train.cache_frozen == "none" or not recipe.train.compile:
        return None
    return (
        "train.cache_frozen puts other forwards in place of the lower blocks', and train.compile has compiled those: "
        "choose one of them. The cache saves more."
    )


def _start(method: Method) -> str | None:
    init = getattr(getattr(method, "inner", method), "init", None)
    return init if isinstance(init, str) else None


RULES: tuple[Rule, ...] = (
    _warmup_ends_before_the_run,
    _measuring_needs_a_valid_split,
    _patience_needs_measurements,
    _patience_needs_a_measure,
    _improvement_needs_patience,
    _best_needs_measurements,
    _drawing_needs_a_temperature,
    _start_batches_need_a_measured_start,
    _fast_roles_exist,
    _output_apart_from_the_model,
    _frozen_cache_knows_the_task,
    _the_compiler_knows_one_route,
    _the_compiler_does_not_checkpoint,
    _one_of_cache_and_compiler,
)
