"""A request on its way through the engine, and each of its answers as it grows."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.serve.detokenize import Detokenizer, StopTexts
from lorakit.serve.requests import (
    FinishEvent,
    GenerationRequest,
    Logprob,
    PromptEvent,
    Reason,
    Timing,
    TokenEvent,
    Usage,
)
from lorakit.serve.sampling import Choice, Chooser, logprobs_of
from lorakit.serve.stream import Stream

if TYPE_CHECKING:
    from lorakit.serve.kv import Slab
    from lorakit.serve.structured import Matcher
    from lorakit.serve.versions import AdapterVersion


class Job:
    """A request, from its submission to the end of its last answer.

    Attributes:
        request: What is asked.
        stream: Where the events go.
        order: Its number, in order of submission.
        submitted: When, by `time.monotonic`.
        matcher: At the start of the request's grammar; None without one.
        answers: Those that run or ran; empty while it waits.
        cached: Tokens of the prompt that the prefix cache gave.
        admitted: When it got its room.
        owed: Tokens of its prompt that were admitted and are not computed yet.
        endings: Ends of answers that the reader has not been told yet: what they held is given back first.
    """

    def __init__(
        self,
        request: GenerationRequest,
        stream: Stream,
        order: int,
        submitted: float,
        matcher: Matcher | None = None,
    ) -> None:
        self.request, self.stream, self.order, self.submitted = request, stream, order, submitted
        self.matcher = matcher
        self.endings: list[FinishEvent] = []
        self._ended = False
        self.answers: list[Answer] = []
        self.cached = self.owed = 0
        self.admitted: float | None = None
        lease = request.lease
        self.version: AdapterVersion | None = None if lease is None else lease.version
        self.digest = None if self.version is None else self.version.digest

    @property
    def room(self) -> int:
        """Tokens of KV cache that each answer needs: of the prompt, and of all but the last that it may write."""
        return len(self.request.prompt) + self.request.max_tokens - 1

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ended or (bool(self.answers) and all(answer.finished for answer in self.answers))

    def tell(self) -> None:
        """Tell the reader which answers have ended."""
        endings, self.endings = self.endings, []
        for event in endings:
            self.stream.put(event)

    def release(self) -> None:
        """Let go of the adapter."""
        if self.request.lease is not None:
            self.request.lease.release()

    def end(self, reason: Reason, now: float, error: Exception | None = None) -> None:
        """End every answer that has not ended."""
        if not self.answers and not self._ended:
            usage = Usage(len(self.request.prompt), 0)
            timing = Timing(None, None, now - self.submitted)
            for index in range(self.request.n):
                self.endings.append(FinishEvent(index, reason, usage, error, None, timing))
        self._ended = True
        for answer in self.answers:
            answer.end(reason, now, error)


class Answer:
    """One answer of a request.

    Attributes:
        job: The request.
        index: Which of its answers.
        slab: Where keys and values are.
        tokens: Of the prompt, and of the answer so far.
        read: How many of them the slab holds.
        leader: The answer that reads the prompt for this one too; None once that is done.
        finished: Whether it has ended.
    """

    def __init__(self, job: Job, index: int, slab: Slab, tokenizer: Any, end_tokens: Collection[int]) -> None:
        request = job.request
        self.job, self.index, self.slab = job, index, slab
        self.version, self.digest = job.version, job.digest
        self.tokens = list(request.prompt)
        self.read = 0
        self.leader: Answer | None = None
        self.finished = False
        self.chooser = Chooser(request.sampling, request.prompt, index=index, logprobs=request.logprobs)
        self.matcher = None if job.matcher is None else job.matcher.copy()
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stops = StopTexts(request.stop)
        self._ends = set(request.stop_token_ids) | (set() if request.ignore_eos else set(end_tokens))
        self._first_token: float | None = None
        self._prompt_logs: list[tuple[int, float | None, tuple[Logprob, ...] | None]] = []

    @property
    def unread(self) -> int:
        """Tokens that a step has still to read before the next one can be chosen."""
        return len(self.tokens) - self.read

    @property
    def started(self) -> bool:
        """Whether it has tokens of its own."""
        return len(self.tokens) > len(self.job.request.prompt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of the prompt's tokens are needed too."""
        return self.index == 0 and not self.started and self.job.request.prompt_logprobs is not None

    def note_prompt(self, logits: Tensor, count: int) -> None:
        """Take the log-probabilities of the prompt's tokens from the logits of ``count`` rows that were just read.

        Called before ``read`` moves on; the logits at a token tell the probability of the next.
        """
        most = self.job.request.prompt_logprobs
        assert most is not None
        if not self._prompt_logs:
            self._prompt_logs.append((self.tokens[0], None, None))
        following = self.tokens[self.read + 1 : self.read + 1 + count]
        if following:
            which = torch.tensor(following, device=logits.device)
            own, top = logprobs_of(logits[: len(following)], which, most)
            for token, logprob, likeliest in zip(following, own, top, strict=True):
                self._prompt_logs.append((token, logprob, tuple(Logprob(*pair) for pair in likeliest)))

    def take(self, choice: Choice, now: float) -> bool:
        """Go on with a token, and tell the reader; ends the answer where it has to end.

        Returns:
            False when the reader does not keep up.
        """
        request, stream, token = self.job.request, self.job.stream, choice.token_id
        if self._first_token is None:
            self._first_token = now
            if self._prompt_logs:
                stream.put(PromptEvent(tuple(self._prompt_logs)))
        self.tokens.append(token)
        self.chooser.accept(token)
        if self.matcher is not None and token not in self._ends:
            self.matcher.accept(token)
        matched: str | int | None = token if token in self._ends else None
        reason: Reason | None = None if matched is None else "stop"
        text = ""
        if matched is None:
            text, matched = self._stops.add(self._detokenizer.add(token))
            written = len(self.tokens) - len(request.prompt)
            if matched is not None or (self.matcher is not None and self.matcher.complete):
                reason = "stop"
            elif written >= request.max_tokens:
                reason = "length"
        if reason is not None and not isinstance(matched, str):
            rest, met = self._stops.add(self._detokenizer.flush())
            text += rest
            if met is None:
                text += self._stops.flush()
            elif matched is None:  # the last, incomplete character completed a stop text
                matched, reason = met, "stop"
        top = None if choice.top is None else tuple(Logprob(*pair) for pair in choice.top)
        kept = stream.put(TokenEvent(self.index, token, text, choice.logprob, top))
        if reason is not None:
            self._end(reason, now, None, matched)
        return kept

    def end(self, reason: Reason, now: float, error: Exception | None = None) -> None:
        """End it before its time; does nothing when it has ended."""
        if not self.finished:
            self._end(reason, now, error, None)

    def _end(self, reason: Reason, now: float, error: Exception | None, matched: str | int | None) -> None:
        self.finished = True
        self.slab.free()
        job = self.job
        usage = Usage(len(job.request.prompt), len(self.tokens) - len(job.request.prompt), job.cached)
        admitted = None if job.admitted is None else job.admitted - job.submitted
        first = None if self._first_token is None else self._first_token - job.submitted
        timing = Timing(admitted, first, now - job.submitted)
        job.endings.append(FinishEvent(self.index, reason, usage, error, matched, timing))
