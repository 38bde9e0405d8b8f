"""LoRAX's `/generate` and `/generate_stream`: the adapter is `parameters.adapter_id`; without one the base answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lorakit.errors import InvalidRequestError
from lorakit.models.conversation import ConversationRenderer
from lorakit.serve.api.chat import number, render
from lorakit.serve.api.events import Followed, event, event_stream, unless_gone
from lorakit.serve.api.naming import Wanted
from lorakit.serve.api.record import RequestRecord
from lorakit.serve.api.sampling import request_maker
from lorakit.serve.api.schemas.generation import Generation
from lorakit.serve.api.schemas.lorax import LoraxParameters, LoraxRequest
from lorakit.serve.api.service import Service
from lorakit.serve.mixes import mix_name
from lorakit.serve.requests import Event, FinishEvent, TokenEvent
from lorakit.serve.versions import parse_id

router = APIRouter()


@router.post("/generate")
async def generate(request: Request, asked: LoraxRequest) -> Response:
    """Go on from a text, the whole answer at once."""
    return await unless_gone(request.receive, _answer(request, asked, stream=False))


@router.post("/generate_stream")
async def generate_stream(request: Request, asked: LoraxRequest) -> Response:
    """Go on from a text, token by token."""
    return await unless_gone(request.receive, _answer(request, asked, stream=True))


async def _answer(request: Request, asked: LoraxRequest, *, stream: bool) -> Response:
    service: Service = request.app.state.service
    record: RequestRecord = request.scope["state"]["record"]
    parameters = asked.parameters
    wanted = _wanted(service, parameters)
    record.model = wanted.text
    wanted = service.visible(wanted, record.tenant)
    if service.options.log_prompts:
        record.prompt = asked.inputs
    async with service.leases(record, wanted, 1) as leases:
        renderer = service.renderer(wanted, record)
        prompt = await service.encode(_encoded, service, renderer, asked)
        make = request_maker(
            service,
            _generation(wanted.text, parameters),
            prompt,
            max_tokens=service.room(prompt, parameters.max_new_tokens, "inputs"),
            logprobs=0,
            tenant=record.tenant.name,
            further_stops=service.server.renderers.stop_ids(renderer),
        )
        followed = service.follow(record, service.submit(leases, [make]), 1)
    before = asked.inputs if parameters.return_full_text else ""
    if stream:
        return await _stream(service, record, parameters, before, followed)
    texts, tokens, finish = [before], [], None
    async for _, what in followed:
        if isinstance(what, FinishEvent):
            finish = what
        elif isinstance(what, TokenEvent):
            texts.append(what.text)
            tokens.append(_token(service, what))
    body: dict[str, Any] = {"generated_text": "".join(texts)}
    if parameters.details and finish is not None:
        body["details"] = {**_details(finish, parameters), "prefill": [], "tokens": tokens}
    return JSONResponse(body)


def _wanted(service: Service, parameters: LoraxParameters) -> Wanted:
    if (mix := parameters.merged_adapters) is not None:
        if len(set(mix.ids)) < len(mix.ids):
            raise InvalidRequestError(
                "merged_adapters names an adapter twice.", param="parameters.merged_adapters"
            )
        weights = dict(zip((str(parse_id(name)) for name in mix.ids), mix.weights, strict=True))
        return Wanted(mix_name(weights), mix=weights)
    if not parameters.adapter_id or parameters.adapter_id == service.server.name:
        return Wanted(service.server.name)
    return Wanted(
        parameters.adapter_id, name=str(parse_id(parameters.adapter_id, param="parameters.adapter_id"))
    )


def _encoded(service: Service, renderer: ConversationRenderer, asked: LoraxRequest) -> list[int]:
    if asked.parameters.apply_chat_template:
        return render(renderer, [{"role": "user", "content": asked.inputs}])
    return list(service.server.tokenizer(asked.inputs)["input_ids"])


def _generation(model: str, parameters: LoraxParameters) -> Generation:
    """The same wishes in OpenAI's words. LoRAX draws tokens only if that, or a way to draw them, is asked for."""
    asked_to_draw = parameters.do_sample or any(
        value is not None for value in (parameters.temperature, parameters.top_k, parameters.top_p)
    )
    return Generation(
        model=model,
        temperature=parameters.temperature if asked_to_draw else 0.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=parameters.seed,
        stop=list(parameters.stop),
        ignore_eos=parameters.ignore_eos_token,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
    )


def _token(service: Service, what: TokenEvent) -> dict[str, Any]:
    return {
        "id": what.token_id,
        "text": service.tokens.one(what.token_id).text,
        "logprob": number(what.logprob),
        "special": what.token_id in service.server.special_ids,
    }


def _end_token(service: Service, finish: FinishEvent) -> dict[str, Any]:
    """The token that ended an answer of no tokens; LoRAX tells the end with a token."""
    end = finish.matched if isinstance(finish.matched, int) else service.server.tokenizer.eos_token_id
    return {"id": end, "text": "", "logprob": None, "special": True}


def _details(finish: FinishEvent, parameters: LoraxParameters) -> dict[str, Any]:
    reason = "length" if finish.reason == "length" else "eos_token"
    return {
        "finish_reason": "stop_sequence" if isinstance(finish.matched, str) else reason,
        "prompt_tokens": finish.usage.prompt_tokens,
        "generated_tokens": finish.usage.completion_tokens,
        "seed": parameters.seed,
    }


async def _stream(
    service: Service, record: RequestRecord, parameters: LoraxParameters, before: str, followed: Followed
) -> Response:
    texts = [before]
    held: list[dict[str, Any]] = []  # the latest token: the last one is told together with the end

    def say(_: int, what: Event) -> Iterator[str]:
        if isinstance(what, TokenEvent):
            texts.append(what.text)
            held.append({"token": _token(service, what), "generated_text": None, "details": None})
        if len(held) == 2:
            yield event(json.dumps(held.pop(0)))
        if isinstance(what, FinishEvent):
            last = held.pop() if held else {"token": _end_token(service, what)}
            yield event(
                json.dumps({**last, "generated_text": "".join(texts), "details": _details(what, parameters)})
            )

    return await event_stream(record, followed, say)
