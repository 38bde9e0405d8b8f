"""Which adapter a folder means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.train.run_adapter import adapter_folder, adapter_for, find_adapter


def saved(folder: Path, base: str | None = None, **info: Any) -> Path:
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, lk.LoRA(r=1), targets="all-linear")
    state = lk.extract(model)
    spec = lk.AdapterSpec(state.spec.methods, state.spec.shapes, base=base, info=info)
    return lk.save(lk.AdapterState(spec, state.tensors), folder)


def run(folder: Path, **recipe: Any) -> Path:
    folder.mkdir(parents=True)
    told = {"recipe": {"model": {"name": "./the-base"}, **recipe}}
    (folder / "run.json").write_text(json.dumps(told))
    return folder


def test_a_runs_folder_means_its_last_adapter_or_its_best(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    last = saved(folder / "adapter", base="public/name")
    assert adapter_folder(folder) == adapter_folder(last) == last
    assert find_adapter(folder) == find_adapter(last) == (last, "./the-base")
    with pytest.raises(ConfigError, match=r"holds no best/ .* It holds: adapter"):
        find_adapter(folder, "best")
    best = saved(folder / "best")
    assert find_adapter(folder, "best") == (best, "./the-base")


def test_an_adapter_alone_names_its_base_itself(tmp_path: Path) -> None:
    alone = saved(tmp_path / "alone", base="public/name")
    assert find_adapter(alone) == (alone, "public/name")
    with pytest.raises(ConfigError, match="no run's folder"):
        find_adapter(alone, "best")
    with pytest.raises(ConfigError, match="last or best"):
        find_adapter(alone, "first")


def test_a_run_that_has_not_ended_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter/ .*lorakit resume.*It holds: nothing"):
        adapter_folder(run(tmp_path / "run"))


def test_of_several_each_has_a_folder(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", adapters=[{"name": "one"}, {"name": "two"}])
    one = saved(folder / "one" / "adapter")
    with pytest.raises(ConfigError, match="holds 2 adapters: one, two"):
        adapter_folder(folder)
    assert adapter_folder(folder / "one") == one
    assert find_adapter(folder / "one") == find_adapter(one) == (one, "./the-base")
    (folder / "two").mkdir()
    with pytest.raises(ConfigError, match="two holds no adapter/"):
        adapter_folder(folder / "two")


def test_an_adapter_for_another_task_is_refused_with_what_it_is_for(tmp_path: Path) -> None:
    kinds = saved(tmp_path / "kinds", task="classification", labels=["a", "b"])
    with pytest.raises(
        ConfigError, match=r"for task: classification, and writes no texts: lorakit classify MODEL"
    ):
        adapter_for(kinds, "writes no texts", "causal-lm", "seq2seq")
    assert adapter_for(kinds, "labels no texts", "sequence-classification") == kinds
    vectors = saved(tmp_path / "vectors", task="embedding")
    with pytest.raises(ConfigError, match=r"for task: embedding, and labels no texts: lorakit eval RECIPE"):
        adapter_for(vectors, "labels no texts", "sequence-classification")
    theirs = saved(tmp_path / "theirs", peft={"task_type": "SEQ_2_SEQ_LM"})
    with pytest.raises(ConfigError, match="for seq2seq, and does not converse"):
        adapter_for(theirs, "does not converse", "causal-lm")
    silent = saved(tmp_path / "silent")
    assert adapter_for(silent, "does not converse", "causal-lm") == silent
