"""`POST /v1/completions`: prompts as text or as token ids."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from lorakit.serve.api.schemas.fields import Text, TokenId
from lorakit.serve.api.schemas.generation import Generation

MOST_PROMPTS = 64
"""Most prompts in one request for completions."""

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
