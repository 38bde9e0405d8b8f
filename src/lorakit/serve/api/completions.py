"""`POST /v1/completions`: prompts as they are, without a chat template; several in one request if wanted."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lorakit.errors import InvalidRequestError
from lorakit.serve.api.chat import closing, number, usage
from lorakit.serve.api.events import Followed, event, event_stream, unless_gone
from lorakit.serve.api.record import RequestRecord
from lorakit.serve.api.sampling import request_maker
from lorakit.serve.api.schemas.completions import CompletionRequest
from lorakit.serve.api.schemas.generation import MOST_CHOICES
from lorakit.serve.api.service import Service
from lorakit.serve.api.tokens import TokenTexts
from lorakit.serve.requests import Event, FinishEvent, Logprob, PromptEvent, TokenEvent

router = APIRouter()

OPENAI_MAX_TOKENS = 16
"""What OpenAI takes where a request for completions names no number of tokens, and clients count on."""


@router.post("/v1/completions")
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Go on from one or several prompts."""
    service: Service = request.app.state.service
    record: RequestRecord = request.scope["state"]["record"]
    return await unless_gone(request.receive, _answer(service, record, asked))


async def _answer(service: Service, record: RequestRecord, asked: CompletionRequest) -> Response:
    record.model = asked.model
    wanted = service.wanted(asked.model, record.tenant)
    given = asked.prompts
    answers = asked.n or 1
    if len(given) * answers > 8 * MOST_CHOICES:
        raise InvalidRequestError(
            f"{len(given)} prompts with {answers} answers each are too many for one request; up to "
            f"{8 * MOST_CHOICES} answers are possible.",
            param="n",
        )
    if service.options.log_prompts:
        record.prompt = given
    prompts = await service.encode(_encoded, service, given)
    echoes = await service.encode(_echoed, service, given) if asked.echo else [""] * len(given)
    makers = [
        request_maker(
            service,
            asked,
            prompt,
            max_tokens=service.room(prompt, asked.max_tokens or OPENAI_MAX_TOKENS, "prompt"),
            logprobs=asked.logprobs,
            tenant=record.tenant.name,
            prompt_logprobs=asked.logprobs if asked.echo else None,
        )
        for prompt in prompts
    ]
    async with service.leases(record, wanted, len(makers)) as leases:
        followed = service.follow(record, service.submit(leases, makers), answers)
    choices = [_Choice(echo) for echo in echoes for _ in range(answers)]
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": service.server.fingerprint(record.digest),
    }
    if asked.stream:
        return await _stream(service, record, asked, head, choices, followed)
    async for index, what in followed:
        choices[index].add(what)
    listed = [
        _choice(service, asked, i, c, c.echo + "".join(c.texts), c.tokens) for i, c in enumerate(choices)
    ]
    return JSONResponse({**head, "choices": listed, "usage": usage(record)})


def _encoded(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [
        prompt if isinstance(prompt, list) else list(service.server.tokenizer(prompt)["input_ids"])
        for prompt in prompts
    ]


def _echoed(service: Service, prompts: Sequence[str | list[int]]) -> list[str]:
    return [p if isinstance(p, str) else str(service.server.tokenizer.decode(p)) for p in prompts]


class _Told(NamedTuple):
    """A token of an answer, or of the prompt that is told with it."""

    token_id: int
    logprob: float | None
    top: Sequence[Logprob] | None
    prompt: bool


def _told(what: TokenEvent | PromptEvent) -> list[_Told]:
    if isinstance(what, PromptEvent):
        return [_Told(*token, prompt=True) for token in what.tokens]
    return [_Told(what.token_id, what.logprob, what.top_logprobs or (), prompt=False)]


@dataclass
class _Choice:
    echo: str
    texts: list[str] = field(default_factory=list)
    tokens: list[_Told] = field(default_factory=list)
    reason: str | None = None
    begun: bool = False  # whether a token of the answer itself was told
    written: int = 0  # characters of text so far, for the offsets of tokens in a stream

    def add(self, what: Event) -> None:
        if isinstance(what, FinishEvent):
            self.reason = what.reason
        else:
            self.tokens += _told(what)
            if isinstance(what, TokenEvent):
                self.texts.append(what.text)


def _choice(
    service: Service,
    asked: CompletionRequest,
    index: int,
    choice: _Choice,
    text: str,
    tokens: Sequence[_Told],
) -> dict[str, Any]:
    logprobs = None
    if asked.logprobs is not None and tokens:
        logprobs = _logprobs(service.tokens, tokens, choice)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}


async def _stream(
    service: Service,
    record: RequestRecord,
    asked: CompletionRequest,
    head: dict[str, Any],
    choices: Sequence[_Choice],
    followed: Followed,
) -> Response:
    def chunk(index: int, text: str, tokens: Sequence[_Told] = ()) -> str:
        body = {**head, "choices": [_choice(service, asked, index, choices[index], text, tokens)]}
        if asked.usage_wanted:
            body["usage"] = None
        return event(json.dumps(body))

    def say(index: int, what: Event) -> Iterator[str]:
        if isinstance(what, FinishEvent):
            choices[index].reason = what.reason
            yield chunk(index, "")
        elif isinstance(what, PromptEvent):
            yield chunk(index, choices[index].echo, _told(what))
        elif what.text or asked.logprobs is not None:
            yield chunk(index, what.text, _told(what))

    echoed = [] if asked.logprobs is not None else enumerate(choices)  # else it comes with its logprobs
    opening = [chunk(index, choice.echo) for index, choice in echoed if choice.echo]
    ends = partial(closing, record, head, usage_wanted=asked.usage_wanted)
    return await event_stream(record, followed, say, opening=opening, closing=ends)


def _logprobs(texts: TokenTexts, tokens: Sequence[_Told], choice: _Choice) -> dict[str, Any]:
    """OpenAI's older form: parallel lists. Advances the choice's count of characters."""
    names, offsets = [], []
    for token in tokens:
        one = texts.one(token.token_id)
        if not token.prompt and not choice.begun:  # single tokens are not always the prompt's text together
            choice.begun, choice.written = True, len(choice.echo)
        names.append(one.key)
        offsets.append(choice.written)
        choice.written += len(one.text)
    return {
        "tokens": names,
        "token_logprobs": [number(token.logprob) for token in tokens],
        "top_logprobs": [
            None
            if token.top is None
            else {texts.one(top.token_id).key: number(top.logprob) for top in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
