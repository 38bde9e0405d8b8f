"""Tiny decoders of many architectures, adapters of many kinds for them, and what transformers generates with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import lorakit as lk
from lorakit.core.adapter import AdapterState
from lorakit.serve.engine import Engine
from lorakit.serve.requests import FinishEvent, GenerationRequest, TokenEvent
from lorakit.serve.scheduler import EngineLimits
from lorakit.serve.stream import Stream
from lorakit.serve.transformers_runner import TransformersRunner
from lorakit.serve.versions import AdapterVersion, Lease, make_version

VOCABULARY = 320
EOS = 319
PROMPT = [5, 9, 77, 30, 2, 61]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # of the size that makes attention and answers differ between tokens
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "llama-tied": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 16}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "mistral-window": ("MistralConfig", {**_SIZES, "sliding_window": 9}),
    "gemma": ("GemmaConfig", {**_SIZES, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_SIZES, "head_dim": 16, "sliding_window": 11}),
    "gpt2": ("GPT2Config", _GPT2),
    "phi": ("PhiConfig", _SIZES),
}


# Of the noise: enough that greedy answers change.
_STRENGTH = {"vera": 1.0, "ia3": 0.6, "loha": 0.4, "lokr": 0.4, "ends": 0.3, "head": 0.4}


def tiny_decoder(name: str) -> Any:
    """The same random model each time."""
    kind, settings = CONFIGS[name]
    return decoder_of(getattr(transformers, kind)(**settings))


def decoder_of(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """256 bytes, some words, and the end of the text."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary |= {f"Ġw{i}": i for i in range(256, EOS)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def adapter_kinds(model: Any) -> dict[str, tuple[Any, list[str] | None]]:
    """Adapters of many kinds: method and targets (None: what the method says)."""
    embedding = next(path for path, m in model.named_modules() if isinstance(m, torch.nn.Embedding))
    return {
        "lora-2": (lk.LoRA(r=2), None),
        "lora-7": (lk.LoRA(r=7, alpha=9), None),
        "rslora": (lk.LoRA(r=4, scaling="rslora"), None),
        "dora": (lk.DoRA(lk.LoRA(r=3)), None),
        "vera": (lk.VeRA(r=8), None),
        "ia3": (lk.IA3(), None),
        "loha": (lk.LoHa(r=2), None),
        "lokr": (lk.LoKr(r=2), None),
        "ends": (lk.LoRA(r=3), [embedding, "lm_head"]),
        "head": (lk.FullFineTuning(), ["lm_head"]),
    }


def random_state(
    model: Any, method: Any, targets: list[str] | None, seed: int, strength: float = 0.15
) -> AdapterState:
    """An adapter that changes what the model says."""
    lk.attach(model, method, targets, name="new", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
    state = lk.extract(model, "new")
    lk.detach(model)
    return state


def versions_of(model: Any) -> dict[str, AdapterVersion]:
    versions = {}
    for seed, (kind, (method, targets)) in enumerate(adapter_kinds(model).items()):
        try:
            state = random_state(model, method, targets, seed, _STRENGTH.get(kind, 0.15))
        except lk.errors.TargetError:  # VeRA needs targets that fit together
            continue
        versions[kind] = make_version(state, kind, 1, "memory")
    return versions


@contextmanager
def attached(model: Any, version: AdapterVersion | None) -> Iterator[None]:
    """The adapter alone on the model, as a user of transformers has it."""
    if version is None:
        yield
        return
    lk.attach(model, version.state, name="alone")
    try:
        yield
    finally:
        lk.detach(model)


@torch.inference_mode()
def alone(model: Any, version: AdapterVersion | None, prompt: Sequence[int], count: int) -> list[int]:
    """What ``generate`` answers to one prompt, with nothing else around: greedy, ``count`` tokens."""
    with attached(model, version):
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS,
        )
    return answer[0, len(prompt) :].tolist()


class CountedLease(Lease):
    """A lease that counts how often it was given back."""

    def __init__(self, version: AdapterVersion) -> None:
        self.returned = 0
        super().__init__(version, self._count, version.name, None)

    def _count(self, lease: Lease) -> None:
        self.returned += 1


def request(
    prompt: Sequence[int], version: AdapterVersion | None = None, **settings: Any
) -> GenerationRequest:
    """A greedy request that does not stop by itself."""
    settings.setdefault("sampling", lk_greedy())
    settings.setdefault("ignore_eos", True)
    lease = None if version is None else CountedLease(version)
    return GenerationRequest(list(prompt), lease, **settings)


def lk_greedy() -> Any:
    from lorakit.serve.sampling import Sampling

    return Sampling(temperature=0)


def read(stream: Stream, timeout: float = 60.0) -> tuple[list[TokenEvent], FinishEvent]:
    """All events of a request with one answer."""
    tokens: list[TokenEvent] = []
    while (event := stream.get(timeout)) is not None:
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, FinishEvent):
            finish = event
    return tokens, finish


def ids(tokens: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in tokens]


def tiny_engine(model: Any, *, kv_tokens: int = 2048, **limits: Any) -> Engine:
    settings = EngineLimits(**{"running": 8, "step_tokens": 32, **limits})
    return Engine(TransformersRunner(model, kv_tokens=kv_tokens), byte_tokenizer(), limits=settings)


def renamed(version: AdapterVersion, name: str) -> AdapterVersion:
    return dataclasses.replace(version, name=name)
