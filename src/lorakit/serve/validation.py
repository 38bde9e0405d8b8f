"""Whether a request can be run at all: said before it waits, and not after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import ContextLengthError, InvalidRequestError, OverloadedError, RateLimitError
from lorakit.serve.kv import rounded
from lorakit.serve.requests import GenerationRequest

if TYPE_CHECKING:
    from lorakit.serve.fairness import FairQueue
    from lorakit.serve.runner import ModelRunner
    from lorakit.serve.scheduler import EngineLimits


def check_request(request: GenerationRequest, runner: ModelRunner, limits: EngineLimits) -> None:
    """Refuse what could never be answered.

    Raises:
        ContextLengthError: Prompt and answer are longer than the model's context or the KV cache.
        InvalidRequestError: A token is not in the vocabulary.
    """
    prompt, total = len(request.prompt), len(request.prompt) + request.max_tokens
    if total > runner.context:
        raise ContextLengthError(
            f"The prompt has {prompt} tokens and up to {request.max_tokens} are to be generated: {total}, but the "
            f"model's context is {runner.context} tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )
    capacity = runner.arena.capacity
    if request.n > limits.running or request.n * rounded(total - 1) > capacity:
        raise ContextLengthError(
            f"n={request.n} answers of up to {total} tokens do not fit: at most {limits.running} run at a time, in a "
            f"KV cache of {capacity} tokens. Lower n or max_tokens.",
            param="n",
        )
    size = runner.vocabulary
    for name, tokens in (
        ("prompt", request.prompt),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", tuple(request.sampling.logit_bias)),
    ):
        odd = next((token for token in tokens if not 0 <= token < size), None)
        if odd is not None:
            raise InvalidRequestError(
                f"{name} has the token {odd}, which is none: the vocabulary has {size} tokens.", param=name
            )


def check_queue(request: GenerationRequest, queue: FairQueue, limits: EngineLimits) -> None:
    """Refuse what would have to wait behind too many.

    Raises:
        OverloadedError: As many requests wait as may.
        RateLimitError: As many of this tenant.
    """
    if len(queue) >= limits.waiting:
        raise OverloadedError(f"{len(queue)} requests are waiting, as many as may wait. Try again later.")
    own = limits.waiting_per_tenant
    if own is not None and queue.waiting_of(request.tenant) >= own:
        raise RateLimitError(f"{own} of your requests are waiting, as many as may wait. Try again later.")
