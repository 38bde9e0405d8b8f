"""The engines that run in Python: lorakit's, PEFT in two ways, merged copies, and transformers' continuous batching."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.serving.load import Asked, Coming

MOST_ROWS = 16  # of a static batch


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
            await self.ask(one, since=began + one.arrival)

        work = [arriving(one) for one in asked] if together is None else [client() for _ in range(together)]
        await asyncio.gather(*work)

    async def ask(self, one: Asked, noted: list[float] | None = None, since: float | None = None) -> None:
        """Answer one request, which has waited ``since`` then; ``noted`` gets the time of each token."""
        from lorakit.serve.requests import FinishEvent, GenerationRequest, TokenEvent
        from lorakit.serve.sampling import Sampling

        one.submitted = time.perf_counter() if since is None else since
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


def _base(model: Path) -> Any:
    """A base under transformers; every answer is as long as was asked for."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    base.generation_config.eos_token_id = None
    return base


class _Peft:
    """transformers' ``generate`` on static batches of at most 16, the oldest requests first."""

    model: Any

    def __init__(self, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        from peft import PeftModel

        torch.set_num_threads(threads)
        base = _base(model)
        self.has_adapters = bool(count)
        if count:
            assert adapters is not None
            base = PeftModel.from_pretrained(base, adapters / "a0000", adapter_name="a0")
            for i in range(1, count):
                base.load_adapter(adapters / f"a{i:04d}", adapter_name=f"a{i}", is_trainable=False)
        self.model = base.eval()

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        waiting: list[Asked] = []
        coming = Coming(asked, together)
        while coming or waiting:
            waiting += coming.due(len(waiting))
            if not waiting:
                coming.wait()
                continue
            batch = self._pick(waiting)[:MOST_ROWS]
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


class MergedCopies(PeftGroups):
    """A copy of the base for each adapter, merged into it by PEFT; each copy answers those who wait for it."""

    def __init__(self, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        from peft import PeftModel

        assert adapters is not None
        torch.set_num_threads(threads)
        self.has_adapters = False  # each copy is a plain model
        self.copies = []
        for i in range(count):
            merged = PeftModel.from_pretrained(_base(model), adapters / f"a{i:04d}").merge_and_unload()
            for parameter in merged.parameters():
                parameter.data = parameter.data.clone()  # its own memory, not the file's pages
            self.copies.append(merged.eval())

    def _answer(self, batch: list[Asked]) -> None:
        assert batch[0].adapter is not None
        self.model = self.copies[batch[0].adapter]
        self._generate(batch, {})


def why_copies_do_not_fit(model: Path, count: int) -> str | None:
    """Why there is no memory for a float32 copy of the base for each adapter; None when there is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorakit.train.free_space import memory

    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    one = sum(parameter.numel() * 4 for parameter in outline.parameters())
    _, free = memory()
    if not free or count * one < 0.9 * free:  # or nobody knows
        return None
    return (
        f"{count} copies of {one / 1e6:.0f} MB take {count * one / 1e9:.0f} GB; {free / 1e9:.0f} GB are free"
    )


class ContinuousBatching:
    """transformers' continuous batching; it has no adapters."""

    def __init__(self, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        assert count == 0, "transformers' continuous batching has no adapters"
        torch.set_num_threads(threads)
        self.model = _base(model).eval()

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

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
        coming = Coming(asked, together)
        running: dict[str, Asked] = {}
        number = 0
        try:
            while coming or running:
                for one in coming.due(len(running)):
                    running[f"r{number}"] = one
                    manager.add_request(
                        one.prompt,
                        request_id=f"r{number}",
                        max_new_tokens=one.tokens,
                        streaming=True,
                        eos_token_id=-1,
                    )
                    number += 1
                if not running:
                    coming.wait()
                    continue
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
