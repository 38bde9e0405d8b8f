"""Prompts around the backbone: what goes in, what comes out, caches, padding, rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import MergeError, RoutingError
from tests.attach.readers import DECODERS, ENCODERS, READERS, adapted, answer, padded, reader, stock, texts

PROMPT = lk.PromptTuning(length=3)
decoders = pytest.mark.parametrize("name", DECODERS)
encoders = pytest.mark.parametrize("name", ENCODERS)
every = pytest.mark.parametrize("name", READERS)


def values(model: nn.Module, name: str = "a") -> Tensor:
    (found,) = (p for n, p in model.named_parameters() if n.endswith(f"inputs.{name}.prompt"))
    return found


@every
def test_without_the_prompt_every_bit_is_the_base_models(name: str) -> None:
    model, batch = adapted(name, PROMPT), padded(texts(5, 3), "right")
    with torch.no_grad():
        base = stock(model)(**batch).logits
        with lk.use(model, None):
            assert torch.equal(model(**batch).logits, base)
        assert not torch.allclose(model(**batch).logits, base)


@decoders
def test_logits_are_those_of_the_longer_input(name: str) -> None:
    model, (ids,) = adapted(name, PROMPT), texts(5)
    base = stock(model)
    with torch.no_grad():
        embedded = torch.cat([values(model), base.get_input_embeddings()(ids)])[None]
        expected = base(inputs_embeds=embedded).logits[:, 3:]
        got = model(input_ids=ids[None]).logits
        assert torch.equal(got, expected)
        vectors = base.get_input_embeddings()(ids)[None]
        assert torch.equal(model(inputs_embeds=vectors).logits, expected)


@every
def test_padding_changes_nothing(name: str) -> None:
    model, rows = adapted(name, PROMPT), texts(6, 4, 2)
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        together = model(**padded(rows, "right")).logits
        for row, single, joint in zip(rows, alone, together, strict=True):
            joint = joint[: len(row)] if name in DECODERS else joint
            torch.testing.assert_close(joint, single, rtol=0, atol=1e-5)


def test_roberta_counts_no_padding_on_the_left_either() -> None:
    """Its padding (token 1) has a position of its own, wherever it stands."""
    rows = texts(6, 3)
    for method in (PROMPT, lk.PrefixTuning(length=3)):
        model = adapted("roberta", method)
        batch = padded(rows, "left")
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
        body = model.roberta
        with torch.no_grad():
            states = body(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
            for row, joint in zip(rows, states, strict=True):
                single = body(input_ids=row[None]).last_hidden_state[0]
                torch.testing.assert_close(joint[-len(row) :], single, rtol=0, atol=1e-5)


@decoders
def test_the_cache_gives_the_same_text(name: str) -> None:
    model, batch = adapted(name, PROMPT), padded(texts(6, 6), "left")
    found = answer(model, batch)
    assert torch.equal(answer(model, batch, use_cache=False), found)
    assert not torch.equal(answer(stock(model), batch), found)


WIDE = pytest.mark.parametrize("name", [name for name in DECODERS if name != "mistral"])
"""Where a layer slides a window over four tokens, padding between a prompt and its text takes room in the window."""


@WIDE
def test_a_batch_writes_what_its_rows_write_alone(name: str) -> None:
    model, rows = adapted(name, PROMPT), texts(7, 4, 5)
    together = answer(model, padded(rows, "left"))
    for row, joint in zip(rows, together, strict=True):
        assert torch.equal(answer(model, padded([row], "left"))[0], joint)


@decoders
def test_beams_take_the_prompt_along(name: str) -> None:
    model, batch = adapted(name, PROMPT), padded(texts(5, 3), "left")
    assert torch.equal(answer(model, batch, num_beams=3), answer(model, batch, num_beams=3, use_cache=False))


@WIDE
def test_rows_write_with_their_own_prompts(name: str) -> None:
    model = adapted(name, PROMPT)
    lk.attach(model, lk.PromptTuning(length=6), name="b", seed=4)
    routes = ["b", None, "a"]
    for lengths in ((5, 3, 4), (4, 4, 4)):
        rows = texts(*lengths)
        with lk.use(model, rows=routes):
            together = answer(model, padded(rows, "left"))
        for row, route, joint in zip(rows, routes, together, strict=True):
            with lk.use(model, route):
                assert torch.equal(answer(model, padded([row], "left"))[0], joint)


@every
def test_rows_have_prompts_of_their_own_lengths_or_none(name: str) -> None:
    model = adapted(name, PROMPT)
    lk.attach(model, lk.PromptTuning(length=5, pooled="prompt"), name="b", seed=4)
    rows, routes = texts(6, 4, 5, 3), ["a", None, "b", "a"]
    with torch.no_grad():
        with lk.use(model, rows=routes):
            together = model(**padded(rows, "right")).logits
        for row, route, joint in zip(rows, routes, together, strict=True):
            with lk.use(model, route):
                single = model(input_ids=row[None]).logits[0]
            joint = joint[: len(row)] if name in DECODERS else joint
            torch.testing.assert_close(joint, single, rtol=0, atol=1e-5)


@every
@pytest.mark.parametrize("return_dict", [True, False], ids=["named", "tuple"])
def test_everything_that_comes_out_has_the_length_of_the_tokens(name: str, return_dict: bool) -> None:
    model, batch = adapted(name, PROMPT, "eager"), padded(texts(5), "right")
    body = model.base_model
    out = body(**batch, output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    fields: Any = out.values() if return_dict else out
    states = [v for f in fields for v in (f if isinstance(f, tuple) else (f,)) if isinstance(v, Tensor)]
    for value in states:
        assert value.dim() == 2 or value.shape[1 if value.dim() == 3 else 2] == 5
    attentions = [value for value in states if value.dim() == 4]
    assert len(attentions) == 2
    for value in attentions:
        torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:3]))


def test_a_pooler_gets_the_first_token_or_the_prompts_first_vector() -> None:
    (ids,) = texts(5)
    found = {}
    for pooled in ("token", "prompt"):
        model = adapted("bert", lk.PromptTuning(length=3, pooled=pooled)).bert
        base = stock(adapted("bert", PROMPT)).bert
        table = base.get_input_embeddings()
        prompt = next(p for n, p in model.named_parameters() if n.endswith("prompt"))
        with torch.no_grad():
            states = base(inputs_embeds=torch.cat([prompt, table(ids)])[None]).last_hidden_state
            out = model(input_ids=ids[None])
            at = 3 if pooled == "token" else 0
            assert torch.equal(out.pooler_output, base.pooler(states[:, at:]))
            assert torch.equal(out.last_hidden_state[:, 1:], states[:, 4:])
            assert torch.equal(out.last_hidden_state[:, 0], states[:, at])
            assert torch.equal(model(input_ids=ids[None], return_dict=False)[1], out.pooler_output)
        found[pooled] = out.pooler_output
    assert not torch.allclose(found["token"], found["prompt"])


def test_a_decoder_that_classifies_pools_its_last_token() -> None:
    import transformers as hf

    from tests.attach.readers import DECODER

    torch.manual_seed(0)
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, num_labels=3)).eval()
    lk.attach(model, lk.PromptTuning(length=3, pooled="prompt"), seed=0)
    rows = texts(5, 1)
    with torch.no_grad():
        together = model(**padded(rows, "right")).logits
        for row, joint in zip(rows, together, strict=True):
            torch.testing.assert_close(joint, model(input_ids=row[None]).logits[0], rtol=0, atol=1e-5)


def test_token_types_are_kept() -> None:
    model, batch = adapted("bert", PROMPT), padded(texts(5), "right")
    kinds = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        assert not torch.allclose(
            model(**batch, token_type_ids=kinds).logits, model(**batch, token_type_ids=0 * kinds).logits
        )
        assert torch.equal(model(**batch, token_type_ids=0 * kinds).logits, model(**batch).logits)


def test_a_prompt_acts_together_with_a_prefix_and_a_lora() -> None:
    """The prefix moves the positions of the prompt too: it is in front of all that is read."""
    model, (ids,) = adapted("llama", PROMPT), texts(5)
    lk.attach(model, lk.PrefixTuning(length=4), name="b", seed=1)
    lk.attach(model, lk.LoRA(r=2), name="c", seed=1)
    with torch.no_grad():
        with lk.use(model, ["a", "b", "c"]):
            together = model(input_ids=ids[None]).logits
        vectors = torch.cat([values(model), model.get_input_embeddings()(ids)])[None]
        with lk.use(model, ["b", "c"]):
            expected = model(inputs_embeds=vectors).logits[:, 3:]
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_lowers_the_loss_at_the_labels_given(name: str) -> None:
    model = adapted(name, PROMPT).train()
    batch = padded(texts(6, 4), "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=5e-1)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_cache_filled_otherwise_is_refused() -> None:
    model, (ids,) = adapted("llama", PROMPT), texts(6)
    first = {"input_ids": ids[None, :5], "use_cache": True}
    with torch.no_grad():
        with lk.use(model, None):
            without = model(**first).past_key_values
        with pytest.raises(RoutingError, match="filled without a prompt"):
            model(input_ids=ids[None, 5:], past_key_values=without)
        filled = model(**first).past_key_values
        with lk.use(model, None), pytest.raises(RoutingError, match="a prompt of 3 vectors"):
            model(input_ids=ids[None, 5:], past_key_values=filled)
        last = model(input_ids=ids[None, 5:], past_key_values=filled).logits[0, -1]
        torch.testing.assert_close(last, model(input_ids=ids[None]).logits[0, -1], rtol=0, atol=1e-5)


def test_generating_on_from_a_cache_is_refused_rather_than_wrong() -> None:
    model, (ids,) = adapted("llama", PROMPT), texts(9)
    with torch.no_grad():
        filled = model(input_ids=ids[None, :5], use_cache=True).past_key_values
        with pytest.raises(RoutingError, match="give it the whole text"):
            answer(model, padded([ids], "left"), past_key_values=filled)


def test_a_cache_of_fixed_size_is_refused() -> None:
    with pytest.raises(RoutingError, match="fixed size"):
        answer(adapted("llama", PROMPT), padded(texts(4), "left"), cache_implementation="static")


def test_packed_rows_and_merging_are_refused() -> None:
    from lorakit.train.packing import packing_error

    model = adapted("llama", PROMPT)
    reason = packing_error(model)
    assert reason is not None
    assert "packed" in reason
    with pytest.raises(MergeError, match="PromptTuning at the model"):
        lk.merge(model)
    lk.attach(model, PROMPT, name="b")
    with lk.use(model, ["a", "b"]), pytest.raises(RoutingError, match="the model's input"):
        model(**padded(texts(4), "right"))


def test_a_hook_that_replaces_the_arguments_is_refused_rather_than_wrong() -> None:
    model = adapted("llama", PROMPT)
    model.model.register_forward_pre_hook(lambda module, args, kwargs: (args, dict(kwargs)), with_kwargs=True)
    with pytest.raises(RoutingError, match="prepend=True"):
        model(**padded(texts(4), "right"))


def test_a_text_longer_than_the_positions_left_is_refused() -> None:
    model = adapted("gpt2", PROMPT)
    assert model(input_ids=torch.ones(1, 29, dtype=torch.long)).logits.shape[1] == 29
    with pytest.raises(RoutingError, match="Cut the texts to 29 tokens"):
        model(input_ids=torch.ones(1, 30, dtype=torch.long))


def test_it_lives_under_the_empty_path_whatever_is_around_the_backbone() -> None:
    model = adapted("llama", PROMPT)
    state = lk.extract(model, "a")
    assert list(state.tensors) == [""]
    inner, (ids,) = reader("llama").model, texts(5)
    lk.attach(inner, state, name="a")
    with torch.no_grad():
        assert torch.equal(inner(input_ids=ids[None])[0], model.model(input_ids=ids[None])[0])
