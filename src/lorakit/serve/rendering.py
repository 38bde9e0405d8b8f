"""Which chat template a request is rendered with: that of its adapter if it was trained with one of its own.

A template is taken when the adapter is loaded, with the weights; what happens to the file later changes nothing.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING

from lorakit.errors import AdapterBaseMismatchError, DataError
from lorakit.models.chat_template import RENDERING_FILE, template_text, tokens_sha256
from lorakit.models.conversation import ConversationRenderer, stop_id
from lorakit.serve.versions import AdapterVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderers:
    """The base's renderer, and those of adapters with templates of their own; any thread may use it.

    Attributes:
        own: The base's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.own = ConversationRenderer(tokenizer)
        self._tokenizer = tokenizer
        self._text, self._tokens = template_text(tokenizer), tokens_sha256(tokenizer)
        self._templates: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._made = lru_cache(maxsize=64)(self._make)

    def note(self, version: AdapterVersion) -> None:
        """Render with the template that an adapter was trained with, if it has one.

        Raises:
            AdapterBaseMismatchError: It was trained with another tokenizer.
        """
        template = version.template
        if template is None:
            return
        if template.tokens_sha256 != self._tokens:
            raise AdapterBaseMismatchError(
                f"The adapter {version.name} was trained with another tokenizer: this base's makes other tokens of the "
                "same text. Load it on the base that its adapter_config.json names; or, if you know that it fits, "
                f"remove {RENDERING_FILE} from its folder."
            )
        with self._lock:
            self._templates[version.digest] = template.text

    def forget(self, version: AdapterVersion) -> None:
        """Let go of an adapter's template."""
        with self._lock:
            self._templates.pop(version.digest, None)

    def of(self, digests: Collection[str | None]) -> ConversationRenderer:
        """What to render with for an adapter, or for a mix of several.

        A mix of adapters that were trained with different templates is rendered with the base's.

        Args:
            digests: Of the adapters; empty for the base.
        """
        with self._lock:
            texts = {self._text if d is None else self._templates.get(d, self._text) for d in digests}
        text = texts.pop() if len(texts) == 1 else self._text
        return self.own if text == self._text else self._made(text)

    def stop_ids(self, renderer: ConversationRenderer) -> tuple[int, ...]:
        """The token that ends answers under a template that is not the base's."""
        if renderer is self.own:
            return ()
        try:
            return (stop_id(renderer.tokenizer),)
        except DataError:
            return ()

    def _make(self, text: str | None) -> ConversationRenderer:
        tokenizer = copy.copy(self._tokenizer)  # the same tokens with another template
        tokenizer.chat_template = text
        return ConversationRenderer(tokenizer)
