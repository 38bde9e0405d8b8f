"""What is asked of the engine, and what comes back: a request, and the events of its answer."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorakit.errors import ConfigError
from lorakit.serve.sampling import MOST_LOGPROBS, Sampling

if TYPE_CHECKING:
    from lorakit.serve.versions import Lease

Reason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What the answer must look like.

    Attributes:
        kind: ``json_object`` (any), ``json_schema``, ``regex``, ``choice`` (one of several texts) or ``lark``.
        value: The schema as JSON text, the expression, the texts, or the grammar; empty for ``json_object``.
    """

    kind: GrammarKind
    value: str | tuple[str, ...] = ""


def _new_id() -> str:
    return uuid.uuid4().hex


@dataclass(eq=False)
class GenerationRequest:
    """One prompt and how to go on from it.

    Attributes:
        prompt: Token ids, at least one.
        lease: The adapter, held until the answer is complete: the engine releases it. None is the base model.
        sampling: How tokens are chosen.
        max_tokens: The most tokens of each answer.
        stop: Texts that end the answer and are not part of it.
        stop_token_ids: Tokens that end the answer, beside the model's own end-of-text tokens.
        ignore_eos: Go on after the model's end-of-text tokens.
        logprobs: Give each token's log-probability, and those of so many of the likeliest; None gives none.
        prompt_logprobs: The same for the tokens of the prompt, in a `PromptEvent`.
        n: Answers to the one prompt.
        tenant: Whose it is: tenants get equal shares, and share no cached prompts.
        deadline: `time.monotonic()` by which it must have left the queue.
        grammar: What the answers must look like.
        priority: Requests of a higher one are admitted first.
        id: Its name for `Engine.abort`.

    Raises:
        ConfigError: A value that makes no sense.
    """

    prompt: list[int]
    lease: Lease | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    tenant: str | None = None
    deadline: float | None = None
    grammar: Grammar | None = None
    priority: int = 0
    id: str = field(default_factory=_new_id)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("The prompt is empty: at least one token is needed to go on from.")
        for name, least in (("max_tokens", 1), ("n", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)!r}.")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is not None and not 0 <= wanted <= MOST_LOGPROBS:
                raise ConfigError(f"{name} must be from 0 to {MOST_LOGPROBS}; got {wanted!r}.")
        if any(not text for text in self.stop):
            raise ConfigError("A stop text is empty: every answer would end at once.")


class Logprob(NamedTuple):
    """A token and its log-probability under the model (before penalties, bias, grammar and temperature)."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One more token of an answer.

    Attributes:
        index: Which of the ``n`` answers.
        token_id: The token.
        text: What can be said now. It may be empty or of several tokens: an incomplete character and the possible
            start of a stop text are held back. All texts of an answer, end to end, are the answer.
        logprob: The token's log-probability, if asked for.
        top_logprobs: Those of the likeliest tokens, the likeliest first, if asked for.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[Logprob, ...] | None = None


class PromptEvent(NamedTuple):
    """The log-probabilities of the prompt's tokens, before the first `TokenEvent`.

    Attributes:
        tokens: For each token its id and log-probability (None for the first), and the likeliest tokens there.
    """

    tokens: tuple[tuple[int, float | None, tuple[Logprob, ...] | None], ...]


class Usage(NamedTuple):
    """Tokens: of the prompt, of this answer, and how many of the prompt's came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timing(NamedTuple):
    """Seconds from submission until: admitted, first token, finished. None for what did not happen."""

    admitted: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of an answer; the last event of its index.

    Attributes:
        index: Which of the ``n`` answers.
        reason: ``stop`` (end of text, a stop token or text, a complete grammar), ``length``, ``abort`` or ``error``.
        usage: Tokens.
        error: Why, for ``error`` and for an ``abort`` that the client did not ask for.
        matched: The stop text or token that ended it, if one did.
        timing: How long it took.
    """

    index: int
    reason: Reason
    usage: Usage
    error: Exception | None = None
    matched: str | int | None = None
    timing: Timing | None = None


Event = TokenEvent | PromptEvent | FinishEvent
