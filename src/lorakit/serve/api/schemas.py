"""What a client may send: every field is checked, and one that is not known is an error that names it.

The fields are OpenAI's, with the sampling fields that vLLM adds to them. OpenAI's own fields that this server cannot
honour may be null (many frameworks send all of them) and are refused otherwise. `user`, `metadata` and `store` change
nothing about an answer; they are accepted and not kept.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

MOST_CHOICES = 16
"""Most answers to one prompt."""
MOST_PROMPTS = 64
"""Most prompts in one request for completions."""
MOST_STOPS = 16
"""Most stop strings."""

Text = Annotated[str, Field(max_length=4_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class Strict(BaseModel):
    """Unknown fields are errors, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


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


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    # OpenAI's, not offered here: null is the same as leaving them out.
    best_of: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


class MergedAdapters(Strict):
    """LoRAX's per-request mix; sums of changes are offered, so the strategy is `linear`."""

    ids: Annotated[list[str], Field(min_length=1, max_length=16)]
    weights: Annotated[list[float], Field(min_length=1, max_length=16)]
    merge_strategy: Literal["linear"] | None = None
    density: None = None
    majority_sign_method: None = None

    @model_validator(mode="after")
    def _same_length(self) -> MergedAdapters:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"merged_adapters has {len(self.ids)} ids and {len(self.weights)} weights")
        return self


class LoraxParameters(Strict):
    """`parameters` of LoRAX's `/generate`."""

    adapter_id: Annotated[str, Field(max_length=2000)] | None = None
    adapter_source: Literal["local"] | None = None
    merged_adapters: MergedAdapters | None = None
    max_new_tokens: Count | None = None
    do_sample: StrictBool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[StopText], Field(max_length=MOST_STOPS)] = []
    ignore_eos_token: StrictBool = False
    return_full_text: StrictBool | None = None
    details: StrictBool = True
    apply_chat_template: StrictBool = False
    # LoRAX's, not offered here.
    api_token: None = None
    best_of: Literal[1] | None = None
    decoder_input_details: Literal[False] | None = None
    return_k_alternatives: None = None
    response_format: None = None
    schema_: None = Field(default=None, alias="schema")
    truncate: None = None
    typical_p: None = None
    watermark: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> LoraxParameters:
        if self.adapter_id and self.merged_adapters:
            raise ValueError("give adapter_id or merged_adapters, not both")
        return self


class LoraxRequest(Strict):
    """`POST /generate` and `/generate_stream`."""

    inputs: Text
    parameters: LoraxParameters = LoraxParameters()
    stream: Literal[False] | None = None


AdapterName = Annotated[str, Field(min_length=1, max_length=2000)]


class LoadAdapter(Strict):
    """`POST /v1/adapters`."""

    name: AdapterName
    source: Annotated[str, Field(min_length=1, max_length=4000)] | None = None
    pinned: StrictBool = False
    if_exists: Literal["error", "replace"] = "error"


class PinAdapter(Strict):
    """`POST /v1/adapters/NAME/pin`."""

    pinned: StrictBool = True


class AliasAdapter(Strict):
    """`POST /v1/adapters/NAME/alias`: a further name for what NAME means now."""

    alias: AdapterName


class VllmLoad(Strict):
    """vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4000)]
    load_inplace: StrictBool = False
    base_model_name: None = None
    is_3d_lora_weight: Literal[False] | None = None


class VllmUnload(Strict):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: AdapterName
    lora_int_id: None = None
