"""Many tasks over one base model from Python, without HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError
from lorakit.models.conversation import Message
from lorakit.serve.native_model import Storage
from lorakit.serve.requests import FinishEvent, GenerationRequest, TokenEvent
from lorakit.serve.sampling import Sampling
from lorakit.serve.server import build_server
from lorakit.serve.versions import AdapterVersion, Lease

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.serve.stream import Stream


class MultiTaskLoRAServer:
    """One base model and many tasks, each an adapter, for use from Python without HTTP.

    ```python
    server = MultiTaskLoRAServer("smollm2")
    server.switch_task("sql", "runs/sql/adapter")
    server.generate("How many singers are there?")
    server.generate_batch([("How many singers?", "sql"), ("Tell me a joke.", None)])
    ```

    Any number of threads may ask at once; all that is asked at a time is computed together.

    Attributes:
        server: What it is made of.
        task: The adapter that `generate` uses; None is the base.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: Storage = "fp32",
        threads: int | None = None,
        kv_tokens: int = 16_384,
    ) -> None:
        """Load the base and start.

        Args:
            base: As for `build_server`.
            tokenizer: As for `build_server`.
            weights: As for `build_server`.
            threads: As for `build_server`.
            kv_tokens: As for `build_server`.
        """
        self.server = build_server(
            base, tokenizer=tokenizer, weights=weights, threads=threads, kv_tokens=kv_tokens
        )
        self.task: str | None = None
        self._encoding = threading.Lock()  # tokenizers change their own settings while they encode
        self.server.start()

    def load_task(self, name: str, path: str | Path) -> AdapterVersion:
        """Read an adapter and give it a name; what had the name before goes on for the requests that use it.

        Raises:
            ServeError: It cannot be read, or not be run on this base.
        """
        return self.server.store.load(name, path, if_exists="replace", anywhere=True).result()

    def switch_task(self, name: str | None, path: str | Path | None = None) -> None:
        """Use an adapter from now on; None is the base.

        Args:
            name: The adapter.
            path: Where to read it, the first time; given again, it is read again.

        Raises:
            ServeError: There is none of that name, or it cannot be read.
        """
        if name is not None:
            if path is not None:
                self.load_task(name, path)
            else:
                self.server.store.entry(name)
        elif path is not None:
            raise ConfigError("The base has no file: switch_task(None) goes back to it.")
        self.task = name

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        task: str | None = None,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """Answer a prompt.

        Args:
            prompt: A text, which becomes the user's turn in the model's chat template, or a whole conversation.
            task: The adapter, if not the current one.
            max_tokens: The most tokens of the answer.
            sampling: How tokens are chosen; the likeliest one by default.
            stop: Texts that end the answer.

        Raises:
            ServeError: There is no such task, or the prompt is too long.
        """
        task = self.task if task is None else task
        return self.generate_batch([(prompt, task)], max_tokens=max_tokens, sampling=sampling, stop=stop)[0]

    def generate_batch(
        self,
        asked: Sequence[tuple[str | Sequence[Message], str | None]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answer prompts for different tasks together, in the same steps.

        Args:
            asked: Each a prompt and its task; the task None is the base.
            max_tokens: The most tokens of each answer.
            sampling: How tokens are chosen; the likeliest one by default.
            stop: Texts that end an answer.

        Returns:
            The answers, in the order of the prompts.
        """
        streams: list[Stream] = []
        try:
            for prompt, task in asked:
                streams.append(self._submit(prompt, task, max_tokens, sampling, stop))
            return [stream.texts()[0] for stream in streams]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        task: str | None = None,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Answer a prompt piece by piece; leaving early stops the work. Arguments are those of `generate`."""
        task = self.task if task is None else task
        for event in self._submit(prompt, task, max_tokens, sampling, stop):
            if isinstance(event, TokenEvent) and event.text:
                yield event.text
            elif isinstance(event, FinishEvent) and event.error is not None:
                raise event.error

    def _submit(
        self,
        prompt: str | Sequence[Message],
        task: str | None,
        max_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[str],
    ) -> Stream:
        server = self.server
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        based = task is None or task == server.name
        lease: Lease | None = None if based else server.store.acquire(str(task)).result()
        try:
            renderer = server.renderers.of([] if lease is None else [lease.version.digest])
            with self._encoding:
                ids = renderer.prompt(turns)
            request = GenerationRequest(
                prompt=ids,
                lease=lease,
                sampling=sampling or Sampling(temperature=0.0),
                max_tokens=max_tokens,
                stop=tuple(stop),
                stop_token_ids=server.renderers.stop_ids(renderer),
            )
            return server.engine.submit(request)
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    def close(self) -> None:
        """Stop, and let go of everything."""
        self.server.close()

    def __enter__(self) -> MultiTaskLoRAServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
