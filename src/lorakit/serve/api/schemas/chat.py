"""`POST /v1/chat/completions`: conversations and tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, ValidationInfo, field_validator, model_validator

from lorakit.serve.api.schemas.fields import Count, Strict, Text
from lorakit.serve.api.schemas.generation import Generation


class TextPart(Strict):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]


class ToolFunction(Strict):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    """What the model may call."""

    type: Literal["function"]
    function: ToolFunction

    @property
    def shown(self) -> dict[str, Any]:
        """As the client wrote it, for the chat template; whether it is strict says nothing to the model."""
        return {
            "type": self.type,
            "function": self.function.model_dump(exclude_unset=True, exclude={"strict"}),
        }


class FunctionName(Strict):
    """One of the tools, by its name."""

    name: ToolName


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """What an assistant called; the arguments are JSON text. Models make names up, so any may come back."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    arguments: Text


class ToolCall(Strict):
    """A call in an assistant's earlier turn; `index`, which streams have, is accepted and says nothing."""

    id: Annotated[str, Field(max_length=200)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: StrictInt | None = None


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=1000)] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, validate_default=True
    )
    name: Annotated[str, Field(max_length=200)] | None = None

    # In answers that clients send back as they got them.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None

    @field_validator("content")
    @classmethod
    def _has_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and not info.data.get("tool_calls"):
            raise ValueError("a turn must have a content")
        return content

    @model_validator(mode="after")
    def _roles(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the assistant has tool_calls, not the role {self.role!r}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"only a tool's turn has a tool_call_id, not the role {self.role!r}")
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """As chat templates' callers write it."""
        told = {"role", "content", "name", "tool_call_id"}
        calls = [call.model_dump(exclude={"index"}) for call in self.tool_calls or ()]
        return {**self.model_dump(include=told), "tool_calls": calls}


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=1000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    # OpenAI's, not offered here: null is the same as leaving them out.
    audio: None = None
    function_call: None = None
    functions: None = None
    modalities: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    safety_identifier: None = None
    service_tier: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _logprobs_asked(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for requests with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens say different things; give one of them")
        return self
