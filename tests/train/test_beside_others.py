"""The same training by other means: torch's optimizer in a plain loop, and PEFT with transformers' own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.models import load_model, load_tokenizer
from lorakit.train import Recipe, load_examples, render, train
from lorakit.train.collate import PaddedCollator
from tests.train.test_trainer import tensors

MakeRecipe = Callable[..., Recipe]
WHOLE: dict[str, Any] = {"batch_rows": 24, "max_steps": 6, "log_every": 1}


def whole_batch(made: Recipe) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(made.model.name)
    rows = render(load_examples(made.data, "train", learning=True), tokenizer, max_length=500).rows
    return PaddedCollator(int(tokenizer.pad_token_id))(rows)


@pytest.mark.parametrize(
    ("ratio", "decay", "schedule"), [(1.0, 0.0, "constant"), (16.0, 0.0, "linear"), (16.0, 0.1, "cosine")]
)
def test_adamw_and_lora_plus_are_the_plain_optimizer(
    recipe: MakeRecipe, ratio: float, decay: float, schedule: str
) -> None:
    made = recipe(
        lora_plus_ratio=ratio,
        weight_decay=decay,
        schedule=schedule,
        warmup=2,
        max_grad_norm=0.5,
        lr=1e-3,
        **WHOLE,
    )
    result = train(made)
    model = load_model(made.model.name)
    lk.attach(model, made.adapter.adapter(), seed=0)
    named = lk.trainable(model)
    groups = [
        {"params": [p for name, p in named.items() if "lora_A" in name], "lr": 1e-3},
        {"params": [p for name, p in named.items() if "lora_B" in name], "lr": 1e-3 * ratio},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    falls = {
        "constant": lambda share: 1.0,
        "linear": lambda share: 1 - share,
        "cosine": lambda share: float(
            0.5 * (1 + torch.cos(torch.tensor(share * torch.pi, dtype=torch.float64)))
        ),
    }[schedule]
    batch, losses = whole_batch(made), []
    for step in range(6):
        factor = step / 2 if step < 2 else falls((step - 2) / 4)
        for group, rate in zip(optimizer.param_groups, (1e-3, 1e-3 * ratio), strict=True):
            group["lr"] = rate * factor
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    live = lk.extract(model)
    trained = tensors(result.adapter)
    for path, group in live.tensors.items():
        for name, tensor in group.items():
            assert torch.allclose(trained[f"{path}.{name}"], tensor, atol=1e-5), (path, name)


def test_peft_with_transformers_trainer_has_the_same_losses(recipe: MakeRecipe, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    made = recipe(lr=5e-3, schedule="linear", warmup=2, **WHOLE)
    start = load_model(made.model.name)
    lk.attach(start, made.adapter.adapter(), seed=0)
    lk.save(start, tmp_path / "start")
    result = train(made)

    model = peft.PeftModel.from_pretrained(load_model(made.model.name), tmp_path / "start", is_trainable=True)
    batch = whole_batch(made)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "peft"), max_steps=6, per_device_train_batch_size=24, learning_rate=5e-3,
        lr_scheduler_type="linear", warmup_steps=2, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert result.losses == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(result.adapter), tensors(tmp_path / "theirs")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-3), name
