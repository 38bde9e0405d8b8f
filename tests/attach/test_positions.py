"""Positions: as a backbone would count them, moved up."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lorakit.attach.positions import cache_of, check_room, first_position, moved, seen_tokens
from lorakit.errors import RoutingError
from tests.attach.readers import reader


def test_they_follow_what_was_read_before() -> None:
    body, ids = reader("llama").model, torch.tensor([[5, 6, 7]])
    assert moved(body, {"input_ids": ids}, 0, 2).tolist() == [[2, 3, 4]]
    assert moved(body, {"inputs_embeds": torch.ones(1, 3, 16)}, 4, 2).tolist() == [[6, 7, 8]]


def test_those_given_are_moved_row_by_row() -> None:
    given = torch.tensor([[0, 0, 1], [0, 1, 2]])
    call = {"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": given}
    by = torch.tensor([[3], [0]])
    assert moved(reader("llama").model, call, 0, by).tolist() == [[3, 3, 4], [0, 1, 2]]


def test_padding_keeps_its_own_position_in_roberta() -> None:
    body = reader("roberta").roberta
    call = {"input_ids": torch.tensor([[1, 7, 8, 1]])}
    assert moved(body, call, 0, 3).tolist() == [[1, 5, 6, 1]]
    assert first_position(body) == 2
    assert first_position(reader("bert").bert) == 0


def test_a_cache_under_any_of_its_names() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    for name in ("past_key_values", "past_key_value", "layer_past"):
        assert cache_of({name: cache}) is cache
        assert seen_tokens({name: cache}) == 3
    assert seen_tokens({"past_key_values": None}) == 0


def test_learned_positions_have_an_end() -> None:
    call = {"input_ids": torch.ones(1, 30, dtype=torch.long)}
    check_room(32, reader("gpt2").transformer, call, 2)
    check_room(None, reader("llama").model, call, 100)
    with pytest.raises(RoutingError, match="32 positions; 3 of them"):
        check_room(32, reader("gpt2").transformer, call, 3)
    with pytest.raises(RoutingError, match="30 positions"):
        check_room(32, reader("roberta").roberta, call, 1)
