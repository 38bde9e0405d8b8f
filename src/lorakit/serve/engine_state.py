"""What an engine is doing, as numbers: for health checks, metrics and whoever looks on."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.serve.prefix import PrefixStatistics
from lorakit.serve.steps import StepFacts


@dataclass(frozen=True)
class EngineState:
    """What the engine is doing.

    Attributes:
        running: Answers that grow or read their prompts.
        waiting: Requests that wait for room.
        running_adapters: Answers of each adapter, by name; the base is None.
        waiting_adapters: Requests of each adapter that wait.
        prompt_tokens: Tokens of prompts that were computed since the start.
        generated_tokens: Tokens of answers since the start.
        tokens_per_second: Of answers, over the last ten seconds.
        steps: Since the start.
        last_step: What the last one computed.
        kv_tokens: Tokens of KV cache in use.
        kv_capacity: Tokens of KV cache.
        prefix: What the prefix cache has done; None without one.
        restarts: How often the engine has been restarted after a failure.
    """

    running: int
    waiting: int
    running_adapters: dict[str | None, int]
    waiting_adapters: dict[str | None, int]
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    steps: int
    last_step: StepFacts
    kv_tokens: int
    kv_capacity: int
    prefix: PrefixStatistics | None
    restarts: int
