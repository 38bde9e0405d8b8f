"""Answers to conversations, in batches: rendered as in training, padded on the left, stopped where a turn ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import ConfigError
from lorakit.models.conversation import ConversationRenderer, Message, Tool, stop_ids
from lorakit.train.collate import text_batch
from lorakit.train.for_a_while import in_eval_mode
from lorakit.train.recipe import GenerateSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    settings: GenerateSection | None = None,
    *,
    tools: Sequence[Sequence[Tool]] | None = None,
    told: Callable[[int, int], None] | None = None,
    streamer: Any = None,
) -> list[str]:
    """The model's answer to each conversation, with whatever adapters act.

    Args:
        model: In ``eval()``, or put there for the time of the call.
        tokenizer: Its tokenizer.
        conversations: Each a list of turns ``{"role": ..., "content": ...}`` that ends with the user's.
        settings: How answers are written; greedy by default.
        tools: For each conversation what the model may call.
        told: Called with the answers done and their number.
        streamer: transformers' streamer, for one conversation alone.

    Returns:
        The answers in the order of the conversations, without special tokens, stripped.

    Raises:
        ConfigError: A prompt leaves no room for an answer.
    """
    settings = settings or GenerateSection()
    renderer = ConversationRenderer(tokenizer)
    given = tools or [()] * len(conversations)
    prompts = [renderer.prompt(turns, each) for turns, each in zip(conversations, given, strict=True)]
    _check_room(model, prompts, settings.max_new_tokens)
    options = _options(model, tokenizer, settings)

    def answer(batch: Sequence[Sequence[int]]) -> list[str]:
        return _batch(model, tokenizer, batch, options, streamer)

    return _in_batches(model, prompts, settings, answer, told)


def generate_from_sources(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    settings: GenerateSection | None = None,
    max_length: int = 1024,
    told: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What a model with an encoder and a decoder writes from each text, with whatever adapters act.

    Args:
        model: In ``eval()``, or put there for the time of the call.
        tokenizer: Its tokenizer.
        sources: What the encoder reads.
        settings: How answers are written; greedy by default.
        max_length: Most tokens of a source; the end of a longer one is cut off.
        told: Called with the answers done and their number.

    Returns:
        The texts in the order of the sources, without special tokens, stripped.
    """
    settings = settings or GenerateSection()
    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    prompts = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in sources]
    # What starts the decoder, and which tokens it may begin or end with, is the checkpoint's own.
    options = copy.deepcopy(model.generation_config)
    options.update(**_settings(settings), pad_token_id=tokenizer.pad_token_id, max_length=None)
    if options.decoder_start_token_id is None:
        options.decoder_start_token_id = model.config.decoder_start_token_id

    def answer(batch: Sequence[Sequence[int]]) -> list[str]:
        made = text_batch(batch, int(tokenizer.pad_token_id))
        inputs = {name: tensor.to(model.device) for name, tensor in made.items()}
        with torch.inference_mode():
            output = model.generate(**inputs, generation_config=options)
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]

    return _in_batches(model, prompts, settings, answer, told)


def _in_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSection,
    answer: Callable[[Sequence[Sequence[int]]], list[str]],
    told: Callable[[int, int], None] | None,
) -> list[str]:
    """Answers in the order of the prompts, from a function that answers a batch; the model's mode is put back."""
    # Rows of like length stand together; the longest come first, so that a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    done = 0
    with in_eval_mode(model), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for start in range(0, len(order), settings.batch_rows):
            rows = order[start : start + settings.batch_rows]
            for i, text in zip(rows, answer([prompts[i] for i in rows]), strict=True):
                answers[i] = text
            done += len(rows)
            if told is not None:
                told(done, len(prompts))
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

    return GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_ids(model, tokenizer), **_settings(settings)
    )


def _settings(settings: GenerateSection) -> dict[str, Any]:
    """A recipe's settings in transformers' words."""
    found: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "use_cache": True,
        "do_sample": settings.temperature > 0,
    }
    if settings.temperature > 0:
        found |= {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    if settings.num_beams > 1:
        found["length_penalty"] = settings.length_penalty
    if settings.no_repeat_ngram_size:
        found["no_repeat_ngram_size"] = settings.no_repeat_ngram_size
    return found


def _check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in prompts), default=0)
    if isinstance(most, int) and longest + new_tokens > most:
        raise ConfigError(
            f"The longest prompt has {longest} tokens; with up to {new_tokens} new ones that is more than "
            f"the {most} that "
            "the model reads. Lower generate.max_new_tokens, or shorten the prompt."
        )
