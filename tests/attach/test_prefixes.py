"""Prefixes inside attentions: masks, caches, padding, rows, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import lorakit as lk
from lorakit.errors import MergeError, RoutingError
from tests.attach.readers import (
    DECODERS,
    ENCODERS,
    READERS,
    adapted,
    answer,
    generate,
    padded,
    reader,
    stock,
    texts,
)

PREFIX = lk.PrefixTuning(length=3)
decoders = pytest.mark.parametrize("name", DECODERS)
encoders = pytest.mark.parametrize("name", ENCODERS)
every = pytest.mark.parametrize("name", READERS)
kinds = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@every
@kinds
def test_without_the_prefix_every_bit_is_the_base_models(name: str, attention: str) -> None:
    model = adapted(name, PREFIX, attention)
    batch = padded(texts(5, 3), "right")
    with torch.no_grad():
        base = stock(model)(**batch).logits
        with lk.use(model, None):
            assert torch.equal(model(**batch).logits, base)
        assert not torch.allclose(model(**batch).logits, base)


@every
def test_both_ways_to_attend_agree(name: str) -> None:
    batch = padded(texts(5, 3), "right")
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        one, other = (adapted(name, PREFIX, attention)(**batch).logits for attention in ("sdpa", "eager"))
    if name in DECODERS:
        one, other = one[kept], other[kept]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@every
@kinds
def test_padding_changes_nothing(name: str, attention: str) -> None:
    """On the right everywhere; on the left where the positions are told, as `generate` does."""
    model, rows = adapted(name, PREFIX, attention), texts(6, 4, 2)
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        together = model(**padded(rows, "right")).logits
        for row, single, joint in zip(rows, alone, together, strict=True):
            joint = joint[: len(row)] if name in DECODERS else joint
            torch.testing.assert_close(joint, single, rtol=0, atol=1e-5)
        if name in DECODERS:
            batch = padded(rows, "left")
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            together = model(**batch, position_ids=positions).logits
            for row, single, joint in zip(rows, alone, together, strict=True):
                torch.testing.assert_close(joint[-len(row) :], single, rtol=0, atol=1e-5)


@decoders
@kinds
def test_the_cache_gives_the_same_text(name: str, attention: str) -> None:
    model, batch = adapted(name, PREFIX, attention), padded(texts(6, 6), "left")
    found = answer(model, batch)
    assert torch.equal(answer(model, batch, use_cache=False), found)
    assert not torch.equal(answer(stock(model), batch), found)


@decoders
def test_a_batch_writes_what_its_rows_write_alone(name: str) -> None:
    model, rows = adapted(name, PREFIX), texts(7, 4, 5)
    together = answer(model, padded(rows, "left"))
    for row, joint in zip(rows, together, strict=True):
        assert torch.equal(answer(model, padded([row], "left"))[0], joint)


@decoders
def test_beams_take_the_prefix_along(name: str) -> None:
    model, batch = adapted(name, PREFIX), padded(texts(5, 3), "left")
    found = answer(model, batch, num_beams=3)
    assert torch.equal(answer(model, batch, num_beams=3, use_cache=False), found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_fixed_size_works_too(name: str) -> None:
    model, batch = adapted(name, PREFIX), padded(texts(5, 3), "left")
    fixed = answer(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(fixed, answer(model, batch))


def test_the_cache_holds_real_tokens_only() -> None:
    model = adapted("llama", PREFIX)
    assert model(**padded(texts(5), "right"), use_cache=True).past_key_values.get_seq_length() == 5


def test_a_sliding_window_does_not_slide_past_the_prefix() -> None:
    """The twentieth token sees four tokens and the prefix: without the prefix its logits are others."""
    model, batch = adapted("mistral", PREFIX), padded(texts(20), "right")
    with torch.no_grad():
        last = model(**batch).logits[0, -1]
        with lk.use(model, None):
            base = model(**batch, position_ids=torch.arange(20)[None] + PREFIX.length).logits[0, -1]
    assert not torch.allclose(last, base, atol=1e-3)


@every
@pytest.mark.parametrize("mlp", [0, 5], ids=["bare", "mlp"])
def test_rows_have_prefixes_of_their_own_lengths_or_none(name: str, mlp: int) -> None:
    model = adapted(name, PREFIX)
    lk.attach(model, lk.PrefixTuning(length=5, mlp=mlp), name="b", seed=4)
    rows, routes = texts(6, 4, 5, 3), ["a", None, "b", "a"]
    with torch.no_grad():
        with lk.use(model, rows=routes):
            together = model(**padded(rows, "right")).logits
        for row, route, joint in zip(rows, routes, together, strict=True):
            with lk.use(model, route):
                single = model(input_ids=row[None]).logits[0]
            joint = joint[: len(row)] if name in DECODERS else joint
            torch.testing.assert_close(joint, single, rtol=0, atol=1e-5)


@decoders
@kinds
def test_rows_write_with_their_own_prefixes(name: str, attention: str) -> None:
    model = adapted(name, PREFIX, attention)
    lk.attach(model, lk.PrefixTuning(length=6), name="b", seed=4)
    routes = ["b", None, "a"]
    for lengths in ((5, 3, 4), (4, 4, 4)):  # without padding, no mask arrives
        rows = texts(*lengths)
        with lk.use(model, rows=routes):
            together = answer(model, padded(rows, "left"))
        for row, route, joint in zip(rows, routes, together, strict=True):
            with lk.use(model, route):
                assert torch.equal(answer(model, padded([row], "left"))[0], joint)


def test_another_kind_of_adapter_acts_beside_it() -> None:
    model, batch = adapted("llama", PREFIX), padded(texts(5), "right")
    lk.attach(model, lk.LoRA(r=2), name="b", seed=0)
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if ".b.lora_B" in n):
            p.normal_(generator=torch.Generator().manual_seed(1))
        with lk.use(model, {"a": 1.0, "b": 0.5}):
            both = model(**batch).logits
        lk.merge(model, {"b": 0.5})
        torch.testing.assert_close(model(**batch).logits, model(**batch).logits)
        with lk.use(model, {"a": 1.0, "b": 0.5}):
            torch.testing.assert_close(model(**batch).logits, both, rtol=0, atol=1e-5)


def test_training_lowers_the_loss() -> None:
    for method in (PREFIX, lk.PrefixTuning(length=3, mlp=8)):
        model = adapted("llama", method).train()
        batch = padded(texts(6, 4), "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=5e-2)
        losses = []
        for _ in range(15):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    model, batch = adapted("llama", PREFIX).train(), padded(texts(6, 4), "right")

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad.clone() for p in lk.trainable(model).values()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@every
def test_a_prefix_for_some_layers(name: str) -> None:
    model = reader(name)
    place = {"gpt2": "h.1.attn", "bert": "layer.1.attention.self", "roberta": "layer.1.attention.self"}
    report = lk.attach(model, PREFIX, [place.get(name, "layers.1.self_attn")], name="a", seed=0)
    assert len(report.sites) == 1
    assert torch.isfinite(model(**padded(texts(4), "right")).logits).all()


@pytest.mark.parametrize("mix", [{"a": 0.5}, {"a": 1.0, "b": 1.0}, {"b": -1.0}])
def test_what_has_no_half_and_no_sum_is_refused(mix: dict[str, float]) -> None:
    model = adapted("llama", PREFIX)
    lk.attach(model, PREFIX, name="b")
    with lk.use(model, mix), pytest.raises(RoutingError, match="no half and no sum"):
        model(input_ids=texts(4)[0][None])
    with lk.use(model, {"a": 1.0, "b": 0.0}):
        model(input_ids=texts(4)[0][None])


def test_merging_is_refused_and_leaves_the_model_alone() -> None:
    model = adapted("llama", PREFIX)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MergeError, match=r"PrefixTuning at 'model\.layers\.0\.self_attn'"):
        lk.merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_wrong_number_of_rows_is_refused() -> None:
    model = adapted("llama", PREFIX)
    with lk.use(model, rows=["a", None, "a"]), pytest.raises(RoutingError, match=r"3 rows.*received 2"):
        model(**padded(texts(4, 4), "right"))


def test_packed_rows_are_refused() -> None:
    from lorakit.train.packing import pack, packed, packing_error

    model = adapted("llama", PREFIX)
    with packed(model), pytest.raises(RoutingError, match="packed"):
        model(**pack([[5, 6, 7], [8, 9]]), use_cache=False)
    reason = packing_error(model)
    assert reason is not None
    assert "packed" in reason
    with lk.use(model, None):
        assert packing_error(model) is None


def test_another_attention_is_refused() -> None:
    model = adapted("llama", PREFIX)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RoutingError, match="set_attn_implementation"):
        model(**padded(texts(4), "right"))


def test_a_text_longer_than_the_positions_left_is_refused() -> None:
    model = adapted("gpt2", PREFIX)
    assert model(input_ids=torch.ones(1, 29, dtype=torch.long)).logits.shape[1] == 29
    with pytest.raises(RoutingError, match="Cut the texts to 29 tokens"):
        model(input_ids=torch.ones(1, 30, dtype=torch.long))


def test_an_attention_that_ignores_its_cache_is_refused() -> None:
    model = adapted("bert", PREFIX)
    attention = model.bert.encoder.layer[0].attention.self
    run = attention.forward
    attention.forward = lambda hidden_states, attention_mask=None, past_key_values=None, **rest: run(
        hidden_states, attention_mask=None
    )
    with pytest.raises(RoutingError, match="did not act"):
        model(**padded(texts(4), "right"))


def test_detaching_one_of_two_and_then_the_other() -> None:
    model = adapted("llama", PREFIX)
    before = {name: list(m._forward_pre_hooks) for name, m in stock(model).named_modules()}
    lk.attach(model, PREFIX, name="b")
    lk.detach(model, "a")
    with lk.use(model, "b"):
        model(input_ids=texts(4)[0][None])
    lk.detach(model, "b")
    assert {name: list(m._forward_pre_hooks) for name, m in model.named_modules()} == before
    assert not any("lorakit" in name for name, _ in model.named_modules())


def test_copies_write_on_their_own() -> None:
    model, batch = adapted("llama", PREFIX), padded(texts(5, 3), "left")
    found, twin = generate(model, batch), copy.deepcopy(model)
    lk.detach(model)
    assert torch.equal(generate(twin, batch), found)
