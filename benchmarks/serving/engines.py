"""The engines that run in Python: lorakit's, PEFT in two ways, and transformers' continuous batching."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.serving.load import Asked


class Engine(Protocol):
    """Something that answers requests."""

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        """Answer all: ``together`` at a time, or each at its arrival. Times are noted on the requests."""

    def close(self) -> None:
        """Let go of everything."""


class Lorakit:
    """`lorakit.serve`, in process."""

    def __init__(
        self, model: Path, adapters: Path | None, threads: int, *, runner: str, weights: str
    ) -> None:
        from lorakit.serve.server import build_server

        self.server = build_server(
            model,
            adapters,
            runner=runner,
            weights=weights,
            threads=threads,
            adapter_bytes=6 << 30,  # type: ignore[arg-type]
        )
        self.server.start()

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        asyncio.run(self._run(asked, together))

    async def _run(self, asked: Sequence[Asked], together: int | None) -> None:
        waiting = iter(asked)
        began = time.perf_counter()

        async def client() -> None:
            for one in waiting:
                await self.ask(one)

        async def arriving(one: Asked) -> None:
            await asyncio.sleep(max(0.0, began + one.arrival - time.perf_counter()))
            await self.ask(one)

        work = [arriving(one) for one in asked] if together is None else [client() for _ in range(together)]
        await asyncio.gather(*work)

    async def ask(self, one: Asked, noted: list[float] | None = None) -> None:
        """Answer one request; ``noted`` gets the time of each token."""
        from lorakit.serve.requests import FinishEvent, GenerationRequest, TokenEvent
        from lorakit.serve.sampling import Sampling

        one.submitted = time.perf_counter()
        lease = None
        if one.adapter is not None:
            lease = await asyncio.wrap_future(self.server.store.acquire(f"a{one.adapter:04d}"))
        request = GenerationRequest(
            one.prompt, lease, Sampling(temperature=0), max_tokens=one.tokens, ignore_eos=True
        )
        async for event in self.server.engine.submit(request):
            if isinstance(event, TokenEvent):
                now = time.perf_counter()
                one.came(event.token_id, now)
                if noted is not None:
                    noted.append(now)
            elif isinstance(event, FinishEvent) and event.reason == "error":
                raise RuntimeError(str(event.error))

    def close(self) -> None:
        self.server.close()


class _Peft:
    """transformers' ``generate`` on static batches of at most 16, the oldest requests first."""

    def __init__(self, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self.has_adapters = bool(count)
        if count:
            assert adapters is not None
            base = PeftModel.from_pretrained(base, adapters / "a0000", adapter_name="a0")
            for i in range(1, count):
                base.load_adapter(adapters / f"a{i:04d}", adapter_name=f"a{i}", is_trainable=False)
        self.model = base.eval()

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        assert together is not None, "static batches have no arrivals"
        waiting: list[Asked] = []
        left = list(asked)
        while left or waiting:
            while left and len(waiting) < together:
                left[0].submitted = time.perf_counter()
                waiting.append(left.pop(0))
            batch = self._pick(waiting)
            for one in batch:
                waiting.remove(one)
            self._answer(batch)

    def _pick(self, waiting: list[Asked]) -> list[Asked]:
        return list(waiting)

    def _answer(self, batch: list[Asked]) -> None:
        names = ["__base__" if one.adapter is None else f"a{one.adapter}" for one in batch]
        self._generate(batch, {"adapter_names": names} if self.has_adapters else {})

    @torch.inference_mode()
    def _generate(self, batch: list[Asked], options: dict[str, Any]) -> None:
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        longest = max(len(one.prompt) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, longest - len(one.prompt) :] = 1

        class Note(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
                now = time.perf_counter()
                for one, token in zip(batch, input_ids[:, -1].tolist(), strict=True):
                    if one.done is None:
                        one.came(token, now)
                return torch.tensor([one.done is not None for one in batch])

        config = GenerationConfig(
            max_new_tokens=max(one.tokens for one in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        criteria = StoppingCriteriaList([Note()])
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=criteria,
            **options,
        )

    def close(self) -> None:
        pass


class PeftMixed(_Peft):
    """PEFT with a name for each row of a batch."""


class PeftGroups(_Peft):
    """PEFT with one adapter at a time: that of the oldest request, for all that wait for it."""

    def _pick(self, waiting: list[Asked]) -> list[Asked]:
        return [one for one in waiting if one.adapter == waiting[0].adapter]

    def _answer(self, batch: list[Asked]) -> None:
        if self.has_adapters:
            self.model.set_adapter(f"a{batch[0].adapter}")
        self._generate(batch, {})


class ContinuousBatching:
    """transformers' continuous batching; it has no adapters."""

    def __init__(self, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        from transformers import AutoModelForCausalLM

        assert count == 0, "transformers' continuous batching has no adapters"
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        assert together is not None
        manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=512, max_batch_tokens=256, allow_block_sharing=False,
                auto_switch_to_flash=False,
            ),
        )  # fmt: skip
        manager.start()
        left, running = list(asked), {}
        number = 0
        try:
            while left or running:
                while left and len(running) < together:
                    one = left.pop(0)
                    one.submitted = time.perf_counter()
                    running[f"r{number}"] = one
                    manager.add_request(
                        one.prompt,
                        request_id=f"r{number}",
                        max_new_tokens=one.tokens,
                        streaming=True,
                        eos_token_id=-1,
                    )
                    number += 1
                result = manager.get_result(timeout=0.05)
                if result is None:
                    continue
                if result.error:
                    raise RuntimeError(result.error)
                one = running[result.request_id]
                now = time.perf_counter()
                for token in result.generated_tokens[len(one.answer) :]:
                    if one.came(token, now):
                        del running[result.request_id]
                        break
        finally:
            manager.stop(block=True)

    def close(self) -> None:
        pass
