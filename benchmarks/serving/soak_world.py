"""What the soak asks about: a tiny base, adapters for it, and what each must answer, found without a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("hello", "What is 1 + 1?", "Ünïcödé 🙂", "the quick brown fox " * 6)
TOKENS = 12
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class World:
    """Folders and the truth about them.

    Attributes:
        base: The model's folder.
        adapters: The server's adapter folder.
        answers: For each source (a sub-folder; ``base`` is none), the greedy answer to each prompt.
        digests: The first eight letters of each source's digest.
    """

    base: Path
    adapters: Path
    answers: dict[str, list[str]]
    digests: dict[str, str]


def make_world(folder: Path, count: int) -> World:
    """Save a base and ``count`` adapters, and ask transformers for the answers."""
    import lorakit as lk
    from lorakit.serve.versions import content_digest

    model, tokenizer = _model(), _tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    prompts = [_ids(tokenizer, text) for text in PROMPTS]
    answers = {"base": [_answer(model, tokenizer, ids) for ids in prompts]}
    digests = {"base": "base"}
    for i in range(count):
        name = f"a{i:02d}"
        fresh = _model()
        lk.attach(fresh, lk.LoRA(r=4 + 4 * (i % 3), alpha=8), targets="all-linear", name="a")
        draw = torch.Generator().manual_seed(i + 1)
        with torch.no_grad():
            for parameter in lk.trainable(fresh).values():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        lk.save(fresh, folder / "adapters" / name, name="a")
        answers[name] = [_answer(fresh, tokenizer, ids) for ids in prompts]
        digests[name] = content_digest(lk.read(folder / "adapters" / name))[:8]
    return World(folder / "base", folder / "adapters", answers, digests)


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=2,
        pad_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # transformers' small start gives a model that hardly depends on its input
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20 if parameter is model.lm_head.weight else 4)
    return model


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
        chat_template=_TEMPLATE, model_max_length=1024,
    )  # fmt: skip
