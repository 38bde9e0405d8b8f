"""From the fields of a request to what the engine is asked."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence

from lorakit.errors import ConfigError, InvalidRequestError
from lorakit.serve.api.schemas.generation import Generation, ResponseFormat, StructuredOutputs
from lorakit.serve.api.service import Make, Service
from lorakit.serve.requests import GenerationRequest, Grammar
from lorakit.serve.sampling import Sampling
from lorakit.serve.versions import Lease


def request_maker(
    service: Service,
    asked: Generation,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    logprobs: int | None,
    tenant: str | None,
    further_stops: Sequence[int] = (),
    grammar: Grammar | None = None,
    prompt_logprobs: int | None = None,
) -> Make:
    """What makes the engine's request of one prompt, once its lease is there.

    Args:
        service: The service.
        asked: What the client wants.
        prompt: Token ids.
        max_tokens: The most tokens of an answer.
        logprobs: How many of the likeliest tokens to tell of each; None tells nothing.
        tenant: Whose request it is.
        further_stops: Tokens that end this adapter's answers beside the base's own.
        grammar: What the answer must look like, where the client has not said so itself.
        prompt_logprobs: The same as ``logprobs``, of the prompt's tokens.

    Raises:
        InvalidRequestError: A value makes no sense to this model.
    """
    _check_ids(service, asked)
    try:
        sampling = _sampling(asked)
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from error
    grammar = grammar or _grammar(asked.response_format or asked.structured_outputs)
    seconds = asked.timeout if asked.timeout is not None else service.options.timeout
    deadline = None if seconds is None else time.monotonic() + seconds

    stop_ids = tuple(asked.stop_token_ids or ())
    if not asked.ignore_eos:
        stop_ids = tuple({*stop_ids, *service.server.stop_ids, *further_stops})

    def make(lease: Lease | None) -> GenerationRequest:
        return GenerationRequest(
            id=uuid.uuid4().hex if lease is None or lease.holder is None else lease.holder,
            prompt=list(prompt),
            lease=lease,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=asked.stops,
            stop_token_ids=stop_ids,
            ignore_eos=bool(asked.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=asked.n or 1,
            tenant=tenant,
            deadline=deadline,
            grammar=grammar,
        )

    return make


def _sampling(asked: Generation) -> Sampling:
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "seed",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if (value := getattr(asked, name)) is not None
    }
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    return Sampling(**given, top_k=max(0, asked.top_k or 0), logit_bias=bias)


def _check_ids(service: Service, asked: Generation) -> None:
    known = service.server.runner.vocabulary
    for param, ids in (("logit_bias", asked.logit_bias), ("stop_token_ids", asked.stop_token_ids)):
        for token in ids or ():
            if int(token) >= known:
                raise InvalidRequestError(
                    f"{param} names the token {int(token)}; the model knows {known} tokens.", param=param
                )


def _grammar(asked: ResponseFormat | StructuredOutputs | None) -> Grammar | None:
    if asked is None:
        return None
    if isinstance(asked, StructuredOutputs):
        schema = asked.json_
    else:
        if asked.type == "text":
            return None
        if asked.type == "json_object":
            return Grammar("json_object")
        schema = None if asked.json_schema is None else asked.json_schema.schema_
    if schema is not None:
        return Grammar("json_schema", json.dumps(schema))
    if asked.regex is not None:
        return Grammar("regex", asked.regex)
    return Grammar("choice", tuple(asked.choice or ()))
