"""Answers: the same alone and in a batch, stopped where training stops, nothing changed on the model."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.models.conversation import stop_ids
from lorakit.train.generation import generate
from lorakit.train.recipe import GenerateSection
from lorakit.train.render import Renderer
from tests.tiny_chat import tiny_model, tiny_tokenizer

ASKED = [
    [{"role": "user", "content": text}] for text in ("a", "a much longer question than that", "Hé?", "12")
]


def by_hand(prompt: list[int], most: int) -> str:
    """Greedy decoding without a cache, a batch, or transformers' generate."""
    model, tokenizer, ids = tiny_model(), tiny_tokenizer(), list(prompt)
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_rows", [1, 3, 16])
def test_greedy_answers_equal_decoding_by_hand(batch_rows: int) -> None:
    tokenizer = tiny_tokenizer()
    told: list[tuple[int, int]] = []
    answers = generate(
        tiny_model(),
        tokenizer,
        ASKED,
        GenerateSection(max_new_tokens=12, batch_rows=batch_rows),
        told=lambda done, total: told.append((done, total)),
    )
    assert answers == [by_hand(Renderer(tokenizer).prompt(turns), 12) for turns in ASKED]
    assert len(set(answers)) > 1
    assert told[-1] == (4, 4)


def test_an_answer_ends_at_the_stop_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    free = generate(model, tokenizer, ASKED[:1], GenerateSection(max_new_tokens=8))[0]
    first = tokenizer(free, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():  # the stop token now comes wherever the first token came
        model.lm_head.weight[tokenizer.eos_token_id] = 2 * model.lm_head.weight[first]
    assert generate(model, tokenizer, ASKED[:1], GenerateSection(max_new_tokens=8)) == [""]


def test_stop_tokens_are_those_of_the_template_the_tokenizer_and_the_makers() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == [0, 2, 7, 9]


def test_drawing_follows_its_seed_and_leaves_the_global_one_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def draw(seed: int) -> list[str]:
        return generate(
            model,
            tokenizer,
            ASKED,
            GenerateSection(max_new_tokens=12, temperature=2.0, top_k=50, top_p=0.9, seed=seed),
        )

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = draw(1)
    assert torch.equal(torch.rand(1), expected)
    assert draw(1) == one
    assert draw(2) != one


def test_mode_is_put_back() -> None:
    model = tiny_model().train()
    generate(model, tiny_tokenizer(), ASKED[:1], GenerateSection(max_new_tokens=1))
    assert model.training


def test_no_room_for_an_answer() -> None:
    with pytest.raises(ConfigError, match="more than the 1024 that"):
        generate(tiny_model(), tiny_tokenizer(), ASKED, GenerateSection(max_new_tokens=1020))
