"""Answers of a given form: which tokens may come next, so that the text fits a schema, an expression or a grammar.

The masks are computed by llguidance (MIT licence), which is an extra: ``pip install "lorakit[structured]"``.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import InternalServeError, InvalidRequestError, MissingDependencyError
from lorakit.serve.requests import Grammar

_KEPT = 64
_LONGEST = 200_000  # characters of a grammar


class GrammarCompiler:
    """Makes matchers for grammars over one tokenizer; compiled ones are kept. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Collection[int]) -> None:
        """Nothing is read before the first grammar comes: then the tokenizer is, which takes about a second.

        Args:
            tokenizer: A fast tokenizer of transformers.
            vocabulary: Width of the model's logits.
            end_tokens: Tokens that end an answer.
        """
        self._of, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(end_tokens)
        self._tokenizer: Any = None
        self._library: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh matcher.

        Raises:
            InvalidRequestError: The grammar is not one, the message says where; or the tokenizer is not a fast one.
            MissingDependencyError: llguidance is not installed.
        """
        with self._lock:
            if self._tokenizer is None:
                self._read_tokenizer()
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = compiled
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._vocabulary)

    def _read_tokenizer(self) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise MissingDependencyError(
                "Answers of a given form (response_format, regex, choice, a required tool call) need llguidance: "
                'pip install "lorakit[structured]".'
            ) from error
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                self._of, n_vocab=max(self._vocabulary, len(self._of)), eos_token=self._ends or None
            )
        except ValueError as error:
            raise InvalidRequestError(
                f"Answers of a given form need a fast tokenizer; this model's is a {type(self._of).__name__} "
                f"({error}).",
                param="response_format",
            ) from error
        self._library = llguidance

    def _compile(self, grammar: Grammar) -> Any:
        matcher = self._library.LLMatcher(self._tokenizer, self._source(grammar), log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(
                f"The {grammar.kind.replace('_', ' ')} cannot be followed: {_first_line(matcher.get_error())}",
                param="response_format",
            )
        return matcher

    def _source(self, grammar: Grammar) -> str:
        kinds, value = self._library.LLMatcher, grammar.value
        length = len(value) if isinstance(value, str) else sum(len(text) for text in value)
        if length > _LONGEST:
            raise InvalidRequestError(
                f"The {grammar.kind} has {length} characters; at most {_LONGEST} are allowed.",
                param="response_format",
            )
        if grammar.kind == "choice":
            if isinstance(value, str) or not value or any(not text for text in value):
                raise InvalidRequestError(
                    f"A choice is a list of texts, none empty; got {value!r}.", param="guided_choice"
                )
            return str(kinds.grammar_from_regex("|".join(_escaped(text) for text in value)))
        if not isinstance(value, str):
            raise InvalidRequestError(
                f"A {grammar.kind} is one text; got {value!r}.", param="response_format"
            )
        if grammar.kind == "regex":
            return str(kinds.grammar_from_regex(value))
        if grammar.kind == "lark":
            return str(kinds.grammar_from_lark(value))
        try:
            schema = {"type": "object"} if grammar.kind == "json_object" else json.loads(value)
            return str(kinds.grammar_from_json_schema(schema))
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(
                f"The JSON schema cannot be read: {_first_line(str(error))}", param="response_format"
            ) from error


class Matcher:
    """Follows one answer through a grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def complete(self) -> bool:
        """Whether the answer fits and nothing can be added."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self) -> Tensor:
        """Which tokens may come next: ``(vocabulary,)`` bool.

        Raises:
            InternalServeError: The grammar has become too complex to follow.
        """
        packed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InternalServeError(
                f"The grammar could not be followed: {_first_line(self._matcher.get_error())}"
            )
        words = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.reshape(-1)[: self._vocabulary].bool()

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token.

        Raises:
            InternalServeError: The grammar does not allow it.
        """
        if not self._matcher.consume_token(token_id):
            raise InternalServeError(
                f"Token {token_id} does not fit the grammar: {_first_line(self._matcher.get_error())}"
            )

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocabulary)


def _escaped(text: str) -> str:
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text).replace("\n", r"\n").replace("\t", r"\t")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason was given"
