"""Names, digests and the memory of a version."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.core import AdapterState
from lorakit.errors import InvalidAdapterIdError
from lorakit.serve import versions
from lorakit.serve.versions import content_digest, make_version, mix_digest, parse_id, parse_name
from tests.serve.store_world import make_state


def test_names() -> None:
    assert parse_id("sql") == ("sql", None)
    assert parse_id("sql-2.b_c@12") == ("sql-2.b_c", 12)
    assert str(parse_id("a@3")) == "a@3"
    assert parse_name("A" * 128) == "A" * 128
    with pytest.raises(InvalidAdapterIdError) as caught:
        parse_name("a@1", param="name")
    assert caught.value.param == "name"


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    state = make_state(1)
    digest = content_digest(state)
    lk.save(state, tmp_path / "one")
    lk.save(state, tmp_path / "two" / "deeper", form="native")
    assert content_digest(lk.read(tmp_path / "two" / "deeper")) == digest
    elsewhere = dataclasses.replace(state.spec, base="/models/somewhere/else")
    assert content_digest(AdapterState(elsewhere, state.tensors)) == digest
    order = dict(reversed(state.tensors.items()))
    assert content_digest(AdapterState(state.spec, order)) == digest


def test_whatever_changes_what_is_computed_changes_the_digest() -> None:
    state = make_state(1)
    digests = {
        content_digest(state),
        content_digest(make_state(2)),
        content_digest(state.to(torch.bfloat16)),
        content_digest(make_state(1, lk.LoRA(r=4, alpha=9))),
        content_digest(make_state(1, lk.LoRA(r=4, alpha=8, scaling="rslora"))),
        content_digest(make_state(1, targets=("up",))),
    }
    assert len(digests) == 6
    path = next(iter(state.tensors))
    state.tensors[path]["lora_A"][0, 0] += 1e-6
    assert content_digest(state) not in digests


def test_a_mix_is_told_by_parts_and_weights() -> None:
    assert mix_digest({"a": 0.5, "b": 1.0}) == mix_digest({"b": 1.0, "a": 0.5})
    assert mix_digest({"a": 0.5, "b": 1.0}) != mix_digest({"a": 1.0, "b": 0.5})


def test_a_version_keeps_no_memory_that_it_does_not_use() -> None:
    state = make_state(1)
    wide = {
        path: {name: torch.zeros(3, *t.shape)[1].copy_(t) for name, t in group.items()}
        for path, group in state.tensors.items()
    }
    version = make_version(AdapterState(state.spec, wide), "a", 1, "somewhere")
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for _, _, t in version.state.all_tensors()
    }
    assert sum(kept.values()) == version.bytes == state.nbytes
    assert version.digest == content_digest(state)
    assert version.rank == 4


def test_what_two_threads_hash_is_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(1)
    alone = content_digest(state)
    monkeypatch.setattr(versions, "_WORTH_A_HELPER", 0)
    assert content_digest(state) == alone

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert content_digest(state) == alone


def test_versions_share_what_is_no_number() -> None:
    one, two = (make_version(make_state(seed), "a", 1, "somewhere").state for seed in (1, 2))
    for path, other in zip(one.tensors, two.tensors, strict=True):
        assert path is other
        assert one.spec.shapes[path] is two.spec.shapes[path]
