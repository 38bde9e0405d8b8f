"""Choosing the next token: what a request may ask for, and how rows of logits become tokens."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import ConfigError, InternalServeError

MOST_LOGPROBS = 20
_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    In this order: penalties, ``logit_bias``, the grammar's mask, ``temperature``, ``top_k``, ``top_p``, ``min_p``.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Only the k likeliest tokens; 0 is all.
        top_p: Only the likeliest tokens that together reach this probability (of what ``top_k`` left).
        min_p: Only tokens with at least this share of the likeliest one's probability.
        seed: Makes the choices repeatable, whatever else runs; None draws one.
        repetition_penalty: Logits of tokens in prompt or answer are divided by it (multiplied where negative).
        presence_penalty: Subtracted from the logits of tokens in the answer.
        frequency_penalty: Subtracted for each time a token is in the answer.
        logit_bias: Added to the logits of these tokens.

    Raises:
        ConfigError: A value out of its range; the message says which.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, math.inf)
        _in_range("top_k", self.top_k, 0, math.inf)
        _in_range("top_p", self.top_p, 0, 1, open_below=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, math.inf, open_below=True)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise ConfigError(f"logit_bias maps token ids to numbers; got the token {token!r}.")
            _in_range(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _in_range(name: str, value: float, least: float, most: float, *, open_below: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most or (open_below and value == least):
        bound = f"more than {least:g}" if open_below else f"at least {least:g}"
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise ConfigError(f"{name} must be {bound}{upper}; got {value!r}.")


class Choice(NamedTuple):
    """A chosen token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability under the model itself, if asked for.
        top: The likeliest tokens and their log-probabilities, the likeliest first, if asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


class Chooser:
    """Chooses the tokens of one answer, and remembers what the next choice depends on."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], *, index: int = 0, logprobs: int | None = None
    ) -> None:
        """Start an answer.

        Args:
            sampling: How to choose.
            prompt: What stands before the answer.
            index: Which of a request's answers: each has its own choices.
            logprobs: How many of the likeliest tokens to tell; None tells not even the chosen one's probability.
        """
        self.sampling, self.logprobs = sampling, logprobs
        seed = sampling.seed
        self._random = random.Random() if seed is None else random.Random(f"{seed} {index}")
        self._before = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()

    @property
    def plain(self) -> bool:
        """Whether the model's logits decide as they are."""
        return not self.sampling.penalised and not self.sampling.logit_bias

    def draw(self) -> float:
        """A number from [0, 1): which of the tokens is taken, laid side by side with their probabilities as widths."""
        return self._random.random()

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if self.sampling.penalised:
            self._counts[token_id] += 1

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits ``(vocabulary,)`` after penalties and bias; a copy."""
        logits, sampling = logits.clone(), self.sampling
        if sampling.repetition_penalty != 1:
            ids = torch.tensor(sorted(self._before | self._counts.keys()), device=logits.device)
            seen, by = logits[ids], sampling.repetition_penalty
            logits[ids] = torch.where(seen > 0, seen / by, seen * by)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        return logits


def choose(
    logits: Tensor, choosers: Sequence[Chooser], masks: Sequence[Tensor | None] | None = None
) -> list[Choice]:
    """The next token of each row.

    Args:
        logits: ``(n, vocabulary)``; not changed.
        choosers: One for each row.
        masks: For each row which tokens are allowed, ``(vocabulary,)`` bool, or None for all.

    Raises:
        InternalServeError: A row has no finite logit that is allowed.
    """
    masks = [None] * len(choosers) if masks is None else masks
    work = logits
    for i, (chooser, mask) in enumerate(zip(choosers, masks, strict=True)):
        if chooser.plain and mask is None:
            continue
        if work is logits:
            work = logits.clone()
        row = chooser.adjusted(logits[i])
        work[i] = row if mask is None else row.masked_fill(~mask, -torch.inf)
    best, tokens = work.max(-1)
    if not bool(torch.isfinite(best).all()):
        raise InternalServeError("The model gave no finite logit for any token that is allowed.")
    chosen = tokens.tolist()
    drawn = [i for i, chooser in enumerate(choosers) if not chooser.sampling.greedy]
    if drawn:
        rows = work if len(drawn) == len(choosers) else work[drawn]
        for i, token in zip(drawn, sample(rows, [choosers[i] for i in drawn]), strict=True):
            chosen[i] = token
    told = [i for i, chooser in enumerate(choosers) if chooser.logprobs is not None]
    if not told:
        return [Choice(token) for token in chosen]
    wanted = max(choosers[i].logprobs or 0 for i in told)
    which = torch.tensor([chosen[i] for i in told], device=logits.device)
    own, top = logprobs_of(logits[told], which, wanted)
    told_at = {i: at for at, i in enumerate(told)}
    return [
        Choice(token, own[told_at[i]], top[told_at[i]][: choosers[i].logprobs])
        if i in told_at
        else Choice(token)
        for i, token in enumerate(chosen)
    ]


def logprobs_of(
    logits: Tensor, tokens: Tensor, most: int
) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
    """Log-probabilities of one token in each row of logits ``(n, vocabulary)``, and of the ``most`` likeliest."""
    logs = logits.float().log_softmax(-1)
    own = logs.gather(-1, tokens[:, None])[:, 0].tolist()
    values, ids = logs.topk(min(most, logs.shape[-1]), dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return own, [tuple(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]


def sample(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Draw a token from each row of logits ``(n, vocabulary)``, every row with its own temperature and cuts."""
    settings = [chooser.sampling for chooser in choosers]
    heat = torch.tensor([s.temperature for s in settings], dtype=torch.float64)
    # In double precision: with a large vocabulary the rounding of a float32 sum would reach the rare tokens.
    scores = (logits.double() - logits.max(-1, keepdim=True).values) / heat.to(logits.device)[:, None]
    draws = torch.tensor([[chooser.draw()] for chooser in choosers], dtype=torch.float64).to(logits.device)
    cut = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1]
    whole = [i for i, s in enumerate(settings) if not (s.top_k or s.top_p < 1)]
    if not whole:  # mostly all rows are of one kind: then none of them is copied
        return _cut(scores, draws, settings)
    if not cut:
        return _whole(scores, draws, settings)
    result = [0] * len(choosers)
    for some, of in ((cut, _cut), (whole, _whole)):
        drawn = of(scores[some], draws[some], [settings[i] for i in some])
        for i, token in zip(some, drawn, strict=True):
            result[i] = token
    return result


def _whole(scores: Tensor, draws: Tensor, settings: Sequence[Sampling]) -> list[int]:
    return _drawn(_above(scores.exp(), settings), draws)


def _cut(scores: Tensor, draws: Tensor, settings: Sequence[Sampling]) -> list[int]:
    vocabulary = scores.shape[-1]
    # The whole mass is needed only where top_k leaves all tokens.
    every = any(not s.top_k or s.top_k >= vocabulary for s in settings)
    total = scores.exp().sum(-1, keepdim=True) if every else scores.new_zeros(())
    kept = torch.tensor([s.top_k or vocabulary for s in settings], device=scores.device)[:, None]
    reach = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=scores.device)[:, None]
    # Sorting the whole vocabulary is dear and rarely needed: a few hundred tokens mostly hold the mass.
    size = min(vocabulary, max(_CANDIDATES, *(s.top_k for s in settings)))
    while True:
        values, ids = scores.topk(size, dim=-1)
        mass = values.exp()
        mass = torch.where(torch.arange(size, device=scores.device) < kept, mass, 0)
        whole = torch.where(kept < vocabulary, mass.sum(-1, keepdim=True), total)
        before = mass.cumsum(-1) - mass
        unsure = (kept >= vocabulary) & (mass.sum(-1, keepdim=True) < reach * whole)
        if size == vocabulary or not bool(unsure.any()):
            break
        size = vocabulary
    mass = torch.where(before < reach * whole, mass, 0)
    places = torch.tensor(_drawn(_above(mass, settings), draws), device=scores.device)
    return ids.gather(-1, places[:, None])[:, 0].tolist()


def _above(mass: Tensor, settings: Sequence[Sampling]) -> Tensor:
    if not any(s.min_p for s in settings):
        return mass
    share = torch.tensor([s.min_p for s in settings], dtype=torch.float64, device=mass.device)[:, None]
    return torch.where(mass >= share * mass.max(-1, keepdim=True).values, mass, 0)


def _drawn(mass: Tensor, draws: Tensor) -> list[int]:
    """The place of each row that a draw falls on; never one without mass."""
    ends = mass.cumsum(-1)
    whole = ends[:, -1:]
    at = torch.minimum(draws * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    places: list[int] = torch.searchsorted(ends, at, right=True)[:, 0].tolist()
    return places
