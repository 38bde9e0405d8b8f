"""Answers to conversations, in batches: rendered as in training, padded on the left, stopped where a turn ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import ConfigError
from lorakit.train.examples import Message
from lorakit.train.recipe import GenerateSection
from lorakit.train.render import Renderer, stop_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    settings: GenerateSection | None = None,
    *,
    told: Callable[[int, int], None] | None = None,
    streamer: Any = None,
) -> list[str]:
    """The model's answer to each conversation, with whatever adapters act.

    Args:
        model: In ``eval()``, or put there for the time of the call.
        tokenizer: Its tokenizer.
        conversations: Each a list of turns ``{"role": ..., "content": ...}`` that ends with the user's.
        settings: How answers are written; greedy by default.
        told: Called with the answers done and their number.
        streamer: transformers' streamer, for one conversation alone.

    Returns:
        The answers in the order of the conversations, without special tokens, stripped.

    Raises:
        ConfigError: A prompt leaves no room for an answer.
    """
    settings = settings or GenerateSection()
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt(turns) for turns in conversations]
    _check_room(model, prompts, settings.max_new_tokens)
    # Rows of like length stand together; the longest come first, so that a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    options = _options(model, tokenizer, settings)
    was_training = model.training
    model.eval()
    done = 0
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            for start in range(0, len(order), settings.batch_rows):
                rows = order[start : start + settings.batch_rows]
                batch = _batch(model, tokenizer, [prompts[i] for i in rows], options, streamer)
                for i, answer in zip(rows, batch, strict=True):
                    answers[i] = answer
                done += len(rows)
                if told is not None:
                    told(done, len(prompts))
    finally:
        model.train(was_training)
    return answers


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: Any,
    streamer: Any,
) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    pad = int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=options, streamer=streamer
        )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _options(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerateSection) -> Any:
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids(model, tokenizer),
        **drawn,
    )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the one that training puts there, and those that the model's makers name."""
    found: set[int | None] = {stop_id(tokenizer)}
    config = getattr(model, "generation_config", None)
    for named in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found |= set(named) if isinstance(named, list) else {named}
    return sorted(token for token in found if token is not None)


def _check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in prompts), default=0)
    if isinstance(most, int) and longest + new_tokens > most:
        raise ConfigError(
            f"The longest prompt has {longest} tokens; with up to {new_tokens} new ones that is more than "
            f"the {most} that "
            "the model reads. Lower generate.max_new_tokens, or shorten the prompt."
        )
