"""How fast, and in how much memory, is SmolLM2-135M trained beside PEFT with transformers' Trainer, on equal batches?

Each side trains in a process of its own, in turns. Both read the same rows in the same order, batch by batch; lorakit
by `lorakit.train`, as a recipe does, PEFT with padded batches and the Trainer's own loss, as its users do. The variable
LORAKIT_DATA names the folder that holds ``generate/``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, PEFT, Aim, Benchmark, main_or_child, run_child, start
from benchmarks.qlora_memory import forget_peak, give_back, resident
from benchmarks.training.run import ALPHA, LR, MODEL, RANK, ROWS, SEED, ends_of_steps, fresh_model, recipe_for

STEPS, WARM = {"e2e_nlg": 16, "instruct_en": 8}, 2


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("train_throughput", __doc__ or "", argv)
    for name in STEPS:
        steps = 4 if bench.quick else STEPS[name]
        runs: dict[str, list[dict[str, Any]]] = {LORAKIT: [], PEFT: []}
        for _ in range(bench.rounds(2) if not bench.quick else 1):
            for side, mine in runs.items():
                plan = {"side": side, "name": name, "steps": steps, "threads": bench.threads}
                mine.append(json.loads(run_child("train_throughput", plan).splitlines()[-1]))
        report(bench, name, runs)
    bench.finish()
    return bench


def report(bench: Benchmark, name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    first = {side: mine[0] for side, mine in runs.items()}
    apart = statistics.fmean(
        abs(a - b) for a, b in zip(first[LORAKIT]["losses"], first[PEFT]["losses"], strict=True)
    )
    last = {side: statistics.fmean(run["losses"][-4:]) for side, run in first.items()}
    curve = (
        f"{len(first[PEFT]['losses'])} steps of {ROWS} rows; loss of the last four steps {last[LORAKIT]:.3f} beside "
        f"PEFT's {last[PEFT]:.3f}, a step's losses {apart:.3f} apart in the mean (the adapters start at different "
        f"numbers); loss on 64 other rows {first[LORAKIT]['valid']:.3f} beside {first[PEFT]['valid']:.3f}."
    )
    speeds = {side: [run["learnt"] / run["seconds"] for run in mine] for side, mine in runs.items()}
    bench.add(
        f"{name}: labelled tokens a second", speeds, unit="tokens/s", ratio=(LORAKIT, PEFT),
        aim=Aim("ratio", ">=", 2.0), note=curve,
    )  # fmt: skip
    memory = {side: [run["peak"] / 1e6 for run in mine] for side, mine in runs.items()}
    bench.add(
        f"{name}: peak memory above the weights", memory, unit="MB", ratio=(LORAKIT, PEFT),
        aim=Aim("ratio", "<=", 0.45), note="Resident memory over that after loading the model.",
    )  # fmt: skip
    shares = {side: [100 * run["limit"] / run["seconds"] for run in mine] for side, mine in runs.items()}
    bench.add(
        f"{name}: share of the limit", shares, unit="%", ratio=None, aim=Aim(LORAKIT, ">=", 75.0),
        note="The limit is the time of the products that cannot be left out (the frozen weights forward and their "
        "input gradients, of the tokens that are read, and the head at labelled tokens), at the rate at which this "
        "machine multiplies matrices of these sizes in the same process, before and after.",
    )  # fmt: skip


# ---- in the child ---------------------------------------------------------------------------------------------------
def child(side: str, name: str, steps: int, threads: int) -> dict[str, Any]:
    """One side's run: what it taught, how long that took, its peak and its losses."""
    import torch

    from lorakit.models import load_tokenizer
    from lorakit.train.batches import plan_run
    from lorakit.train.tasks.causal_lm import CausalLm

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_for(name, steps, folder, valid=64)
        tokenizer = load_tokenizer(MODEL)
        task = CausalLm(recipe)
        rows = task.rows(tokenizer, "train").rows
        valid = task.rows(tokenizer, "valid").rows
        model = fresh_model()
        batches = plan_run(recipe.train, rows, False)
        learnt = [sum(label != -100 for i in batch for label in rows[i].labels[1:]) for batch in batches]
        first_rate = gemm_rate()
        give_back()
        before = resident("VmRSS")
        forget_peak()
        run = _lorakit if side == LORAKIT else _peft
        losses, times, model = run(
            recipe, model, tokenizer, [[rows[i] for i in batch] for batch in batches], folder
        )
        peak = resident("VmHWM") - before
        # A processor that has worked for minutes is not as fast as it was at first, and neighbours come and go.
        rate = (first_rate + gemm_rate()) / 2
        tokens = [sum(len(rows[i].ids) for i in batch) for batch in batches]
        return {
            "seconds": sum(times[WARM:]),
            "learnt": sum(learnt[WARM:]),
            "limit": least_flops(model, sum(tokens[WARM:]), sum(learnt[WARM:])) / rate,
            "peak": peak,
            "losses": losses,
            "valid": loss_on(model, tokenizer, valid),
            "rate": rate,
        }


def gemm_rate() -> float:
    """Multiplications and additions a second of the layers' products, in the proportions in which a step has them."""
    import torch

    best = []
    for n, out in ((576, 576), (576, 1536), (1536, 576)):
        x, W = torch.randn(928, n), torch.randn(out, n)
        times = []
        for _ in range(40):
            begin = time.perf_counter()
            torch.nn.functional.linear(x, W)
            times.append(time.perf_counter() - begin)
        best.append((2 * 928 * n * out, statistics.median(times)))
    return sum(work for work, _ in best) / sum(seconds for _, seconds in best)


def least_flops(model: Any, tokens: int, learnt: int) -> float:
    """Of the frozen products, forward and with respect to their inputs."""
    from torch import nn

    head = model.get_output_embeddings().weight.numel()
    linear = [
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 64
    ]
    return 2 * 2 * ((sum(linear) - head) * tokens + head * learnt)


def _lorakit(
    recipe: Any, model: Any, tokenizer: Any, batches: Any, folder: Path
) -> tuple[list[float], list[float], Any]:
    from lorakit.train import train

    without_valid = recipe.model_copy(update={"data": recipe.data.model_copy(update={"valid": None})})
    result = train(without_valid, model=model, tokenizer=tokenizer)
    ends = ends_of_steps(result.folder)
    return list(result.losses), [b - a for a, b in zip([0.0, *ends], ends, strict=False)], result.model


def _peft(
    recipe: Any, model: Any, tokenizer: Any, batches: Any, folder: Path
) -> tuple[list[float], list[float], Any]:
    import peft
    import torch
    import transformers

    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    rows = [{"input_ids": list(row.ids), "labels": list(row.labels)} for batch in batches for row in batch]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.begin)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "peft"), per_device_train_batch_size=ROWS, max_steps=len(batches), learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=recipe.train.weight_decay, max_grad_norm=recipe.train.max_grad_norm,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, seed=SEED,
        gradient_checkpointing=False,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], times, model


def loss_on(model: Any, tokenizer: Any, rows: Any) -> float:
    """The mean loss of some rows' labelled tokens, one row at a time."""
    import torch

    model.eval()
    total, learnt = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0, :-1].float()
            labels = torch.tensor(list(row.labels)[1:])
            total += float(
                torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            )
            learnt += int((labels != -100).sum())
    return total / learnt


if __name__ == "__main__":
    main_or_child(main, lambda plan: print(json.dumps(child(**plan))))
