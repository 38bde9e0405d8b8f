"""What routes put in front of the rows of a batch."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.hooks import RemovableHandle

import lorakit as lk
from lorakit.attach.attachments import attachments_of
from lorakit.attach.places import Front, front
from lorakit.attach.prompts import InputSlot
from lorakit.core.route import Mix, Rows
from lorakit.errors import RoutingError
from tests.attach.readers import adapted


@pytest.fixture
def slot() -> InputSlot:
    model = adapted("llama", lk.PromptTuning(length=2))
    lk.attach(model, lk.PromptTuning(length=4), name="b", seed=1)
    (found,) = attachments_of(model).slots
    assert isinstance(found, InputSlot)
    return found


def made(slot: InputSlot, route: Mix | Rows, rows: int = 3) -> Front | None:
    return front(slot, route, rows, slot._vectors)


def test_one_route_for_all_rows(slot: InputSlot) -> None:
    found = made(slot, Mix.of("a"))
    assert found is not None
    assert (found.longest, found.lengths, len(found.adapters)) == (2, None, 1)
    assert found.tensors[0].shape == (1, 2, 16)
    assert found.visible(torch.device("cpu")) is None
    assert found.shift(torch.device("cpu")) == 2
    assert made(slot, Mix.of(None)) is None
    assert made(slot, Mix.of("b"), rows=7) is not None


def test_rows_end_next_to_their_tokens(slot: InputSlot) -> None:
    found = made(slot, Rows.of(["a", None, "b"]))
    assert found is not None
    assert (found.longest, found.lengths) == (4, (2, 0, 4))
    visible = found.visible(torch.device("cpu"))
    assert visible is not None
    assert visible.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    shift = found.shift(torch.device("cpu"))
    assert isinstance(shift, torch.Tensor)
    assert shift.tolist() == [[2], [0], [4]]
    values = found.tensors[0]
    assert not values[0, :2].any()
    assert torch.equal(values[0, 2:], slot.adapter("a")._parameters["prompt"])  # type: ignore[union-attr]
    assert [a is None for a in found.adapters] == [False, True, False]


def test_rows_of_one_length_need_no_mask(slot: InputSlot) -> None:
    found = made(slot, Rows.of(["b", "b"]), rows=2)
    assert found is not None
    assert found.lengths is None
    assert found.tensors[0].shape == (2, 4, 16)
    assert made(slot, Rows.of([None, None]), rows=2) is None


def test_the_number_of_rows_and_the_weights_are_checked(slot: InputSlot) -> None:
    with pytest.raises(RoutingError, match=r"3 rows.*the model's input received 2"):
        made(slot, Rows.of(["a", None, "b"]), rows=2)
    with pytest.raises(RoutingError, match=r"0.5 \* a"):
        made(slot, Rows.of([{"a": 0.5}]), rows=1)


def test_a_hook_added_after_unpickling_does_not_take_the_place_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted("llama", lk.PrefixTuning(length=2))
    attention = model.model.layers[0].self_attn
    own = [*attention._forward_pre_hooks, *attention._forward_hooks]
    blob = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", min(own))
    twin = pickle.loads(blob)
    added = twin.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: None)
    assert added.id not in own
    assert len(twin.model.layers[0].self_attn._forward_pre_hooks) == 2
