"""LoRAX's `POST /generate` and `/generate_stream`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from lorakit.serve.api.schemas.fields import MOST_STOPS, Count, StopText, Strict, Text


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
    stop: Annotated[list[StopText], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
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
