"""Loading, naming, pinning and unloading adapters: this server's calls, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from lorakit.serve.api.schemas.fields import Strict

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
