"""What requests for completions and for chat completions have in common: sampling, stops, the form of the answer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, field_validator, model_validator

from lorakit.serve.api.schemas.fields import MOST_STOPS, Count, StopText, Strict, Text, TokenId

MOST_CHOICES = 16
"""Most answers to one prompt."""


class StreamOptions(Strict):
    """How a stream is written; OpenAI's padding against traffic analysis is accepted and not done."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None


class JsonSchema(Strict):
    """A named JSON schema, as `response_format` holds it."""

    name: Annotated[str, Field(max_length=200)] = "answer"
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """What an answer must look like: OpenAI's three types, and an expression or a choice."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        for kind in ("json_schema", "regex", "choice"):
            given = getattr(self, kind) is not None
            if given != (self.type == kind):
                state = "needs" if not given else "is not for"
                raise ValueError(f"response_format of the type {self.type!r} {state} the field {kind!r}")
        return self


class StructuredOutputs(Strict):
    """vLLM's way to ask for structure; one of the three."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice)) != 1:
            raise ValueError("structured_outputs takes exactly one of json, regex and choice")
        return self


class Generation(Strict):
    """What requests for completions and for chat completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=2000)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: StrictBool | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None

    # Accepted, without effect on the answer.
    user: Annotated[str, Field(max_length=1000)] | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) <= 9):
                raise ValueError(f"logit_bias is from token ids to numbers; {token[:40]!r} is no token id")
            if not -100 <= value <= 100 or math.isnan(value):
                raise ValueError(f"logit_bias of the token {token} must be between -100 and 100")
        return bias

    @model_validator(mode="after")
    def _agree(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for requests with stream: true")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("give response_format or structured_outputs, not both")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage
