"""`POST /v1/chat/completions`, as OpenAI's clients speak it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lorakit.errors import DataError, InvalidRequestError
from lorakit.models.conversation import ConversationRenderer, normalised
from lorakit.serve.api.events import DONE, Followed, event, event_stream, unless_gone
from lorakit.serve.api.record import RequestRecord
from lorakit.serve.api.sampling import request_maker
from lorakit.serve.api.schemas.chat import ChatRequest
from lorakit.serve.api.service import Service
from lorakit.serve.api.tokens import TokenTexts
from lorakit.serve.api.tools import Message, ToolUse, check_tools, tool_use
from lorakit.serve.requests import Event, FinishEvent, TokenEvent

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation, rendered with the model's own chat template."""
    service: Service = request.app.state.service
    record: RequestRecord = request.scope["state"]["record"]
    return await unless_gone(request.receive, _answer(service, record, asked))


async def _answer(service: Service, record: RequestRecord, asked: ChatRequest) -> Response:
    record.model = asked.model
    wanted = service.wanted(asked.model, record.tenant)
    check_tools(asked)
    messages = _turns(asked)
    if service.options.log_prompts:
        record.prompt = messages
    answers = asked.n or 1
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    async with service.leases(record, wanted, 1) as leases:
        renderer = service.renderer(wanted, record)
        use = tool_use(renderer, asked)
        prompt = await service.encode(render, renderer, messages, use)
        make = request_maker(
            service,
            asked,
            prompt,
            max_tokens=service.room(prompt, asked.max_completion_tokens or asked.max_tokens, "messages"),
            logprobs=logprobs,
            tenant=record.tenant.name,
            further_stops=service.server.renderers.stop_ids(renderer),
            grammar=None if use is None else use.forced,
        )
        try:
            followed = service.follow(record, service.submit(leases, [make]), answers)
        except InvalidRequestError as error:
            if use is None or use.forced is None:
                raise
            raise InvalidRequestError(str(error), param="tools") from error  # the grammar is made of them
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if asked.stream else "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": service.server.fingerprint(record.digest),
    }
    if asked.stream:
        return await _stream(service, record, asked, use, head, followed)
    return JSONResponse(await _whole(service, record, asked, use, head, followed))


def render(
    renderer: ConversationRenderer, messages: list[dict[str, Any]], use: ToolUse | None = None
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        InvalidRequestError: The chat template refuses it, or shows no tools.
    """
    if use is None:
        try:
            return renderer.prompt(messages)
        except DataError as error:
            raise InvalidRequestError(str(error), param="messages") from error
    try:
        return renderer.ids(renderer.prompt_text(messages, use.shown) + use.prompt)
    except DataError as error:
        raise InvalidRequestError(str(error), param="tools") from error


def _turns(asked: ChatRequest) -> list[dict[str, Any]]:
    try:
        return normalised([message.turn for message in asked.messages])
    except DataError as error:
        raise InvalidRequestError(str(error), param="messages") from error


@dataclass
class _Choice:
    message: Message
    tokens: list[TokenEvent] = field(default_factory=list)
    reason: str | None = None


async def _whole(
    service: Service,
    record: RequestRecord,
    asked: ChatRequest,
    use: ToolUse | None,
    head: dict[str, Any],
    followed: Followed,
) -> dict[str, Any]:
    choices = [_Choice(Message(use)) for _ in range(asked.n or 1)]
    async for index, what in followed:
        if isinstance(what, FinishEvent):
            choices[index].message.finish()
            choices[index].reason = choices[index].message.reason(what.reason)
        elif isinstance(what, TokenEvent):
            choices[index].message.add(what)
            if asked.logprobs:
                choices[index].tokens.append(what)
    return {
        **head,
        "choices": [
            {
                "index": index,
                "message": choice.message.whole(),
                "logprobs": _logprobs(service.tokens, choice.tokens) if asked.logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(record),
    }


async def _stream(
    service: Service,
    record: RequestRecord,
    asked: ChatRequest,
    use: ToolUse | None,
    head: dict[str, Any],
    followed: Followed,
) -> Response:
    messages = [Message(use) for _ in range(asked.n or 1)]

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, tokens: list[TokenEvent] | None = None
    ) -> str:
        logprobs = _logprobs(service.tokens, tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        body = {**head, "choices": [choice]}
        if asked.usage_wanted:
            body["usage"] = None
        return event(json.dumps(body))

    def say(index: int, what: Event) -> Iterator[str]:
        message = messages[index]
        if isinstance(what, FinishEvent):
            yield from (chunk(index, delta) for delta in message.finish())
            yield chunk(index, {}, message.reason(what.reason))
        elif isinstance(what, TokenEvent):
            deltas = message.add(what)
            if asked.logprobs:
                first, *deltas = deltas or [{"content": ""}]
                yield chunk(index, first, None, [what])
            yield from (chunk(index, delta) for delta in deltas)

    opening = [chunk(index, {"role": "assistant", "content": ""}) for index in range(asked.n or 1)]
    ends = partial(closing, record, head, usage_wanted=asked.usage_wanted)
    return await event_stream(record, followed, say, opening=opening, closing=ends)


def _logprobs(texts: TokenTexts, tokens: list[TokenEvent]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_logprob(texts, token.token_id, token.logprob),
                "top_logprobs": [
                    _logprob(texts, top.token_id, top.logprob) for top in token.top_logprobs or ()
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _logprob(texts: TokenTexts, token_id: int, logprob: float | None) -> dict[str, Any]:
    token = texts.one(token_id)
    return {"token": token.text, "logprob": number(logprob), "bytes": list(token.bytes)}


def number(logprob: float | None) -> float | None:
    """A log-probability as JSON can hold it: OpenAI, too, writes -9999 for what has no probability at all."""
    return None if logprob is None else max(float(logprob), -9999.0)


def closing(record: RequestRecord, head: dict[str, Any], *, usage_wanted: bool) -> Iterator[str]:
    """The last events of a stream: the usage if it is wanted, and the word that says that this was all."""
    if usage_wanted:
        yield event(json.dumps({**head, "choices": [], "usage": usage(record)}))
    yield DONE


def usage(record: RequestRecord) -> dict[str, int]:
    """The counts of a request's tokens."""
    prompt, written = record.prompt_tokens or 0, record.completion_tokens or 0
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
