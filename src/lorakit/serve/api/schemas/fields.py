"""What every body is made of: unknown fields are errors, and texts and numbers have bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_STOPS = 16
"""Most stop strings."""

Text = Annotated[str, Field(max_length=4_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class Strict(BaseModel):
    """Unknown fields are errors, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
