"""Directories: which adapter is meant, which of its files holds, pickles, and what is told when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io import read, why_not_peft, write
from lorakit.methods import DoRA, LoRA
from tests.io.states import assert_equal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(r: int = 2, *, native: bool = False, **info: Any) -> AdapterState:
    shape = Shape("conv", 4, 6, (2,), (1,)) if native else Shape("linear", 4, 6)
    method = LoRA(r=r)
    torch.manual_seed(r)
    return AdapterState(
        AdapterSpec({"a.fc": method}, {"a.fc": shape}, "org/base", info),
        {"a.fc": {n: torch.randn(s) for n, s in method.shapes(shape).items()}},
    )


def edit(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **settings}))


def peft_file(directory: Path, state: AdapterState) -> Path:
    """The same without what we add to the weights."""
    write(state, directory)
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"format": "pt"})
    return directory


# ---- which adapter --------------------------------------------------------------------------------------------------
def test_a_directory_a_file_and_a_name(tmp_path: Path) -> None:
    write(adapter(1), tmp_path)
    write(adapter(2), tmp_path / "two")
    assert_equal(read(tmp_path), adapter(1))
    assert_equal(read(str(tmp_path)), adapter(1))
    assert_equal(read(tmp_path, name="two"), adapter(2))
    assert_equal(read(tmp_path, name="default"), adapter(1))
    assert_equal(read(tmp_path / "two" / WEIGHTS), adapter(2))


def test_a_parent_of_one_adapter_needs_no_name(tmp_path: Path) -> None:
    write(adapter(2), tmp_path / "sql")
    (tmp_path / "logs").mkdir()
    assert_equal(read(tmp_path), adapter(2))
    write(adapter(1), tmp_path / "other")
    with pytest.raises(
        AdapterFileError, match=r"several adapters: other, sql\. Say which: read\(\.\.\., name='other'"
    ):
        read(tmp_path)


def test_a_parent_as_peft_leaves_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 4)),
        peft.LoraConfig(r=2, target_modules=["0"]),
        adapter_name="sql",
    )
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert list(read(tmp_path).spec.methods) == ["0"]


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("nothing", None, "no such file or directory"),
        ("sq", None, "Did you mean 'sql'"),
        ("empty", None, "holds no adapter"),
        ("sql", "x", "no adapters in sub-directories"),
        (".", "sq", "Did you mean 'sql'"),
        ("sql/" + WEIGHTS, "x", "is a file"),
    ],
)
def test_nothing_there(path: str, name: str | None, message: str, tmp_path: Path) -> None:
    write(adapter(), tmp_path / "sql")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path / path, name=name)


def test_half_an_adapter(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterFileError, match=f"no {WEIGHTS}"):
        read(tmp_path)
    peft_file(tmp_path, adapter())
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=f"no {CONFIG}, and the weights carry no configuration"):
        read(tmp_path)


def test_our_weights_alone_are_a_whole_adapter(tmp_path: Path) -> None:
    for native in (False, True):
        write(adapter(native=native, task="sql"), tmp_path)
        moved = tmp_path / f"moved-{native}.safetensors"
        (tmp_path / WEIGHTS).rename(moved)
        (tmp_path / CONFIG).unlink()
        assert_equal(read(moved), adapter(native=native, task="sql"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\xff", "[" * 100_000])
def test_a_configuration_that_is_not_one(text: str, tmp_path: Path) -> None:
    peft_file(tmp_path, adapter())
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterFileError, match=CONFIG):
        read(tmp_path)


def test_errors_name_the_place(tmp_path: Path) -> None:
    peft_file(tmp_path, adapter())
    edit(tmp_path, use_qalora=True)
    with pytest.raises(AdapterFileError, match=str(tmp_path)):
        read(tmp_path)
    edit(tmp_path, use_qalora=False, new_thing=7)
    assert_equal(
        AdapterState(
            AdapterSpec(read(tmp_path, ignore=["new_thing"]).spec.methods, adapter().spec.shapes, "org/base"),
            adapter().tensors,
        ),
        adapter(),
    )


# ---- which configuration ---------------------------------------------------------------------------------------------
def test_harmless_changes_of_the_configuration_hold(tmp_path: Path) -> None:
    write(adapter(task="sql"), tmp_path)
    edit(tmp_path, base_model_name_or_path="moved/base", task_type="CAUSAL_LM")
    state = read(tmp_path)
    assert state.spec.base == "moved/base"
    assert state.spec.info["task"] == "sql"
    assert state.spec.info["peft"]["task_type"] == "CAUSAL_LM"


def test_a_change_with_consequences_must_be_confirmed(tmp_path: Path) -> None:
    write(adapter(), tmp_path)
    edit(tmp_path, lora_alpha=99)
    with pytest.raises(AdapterFileError, match=r"lora_alpha: 16 -> 99.*prefer='config'.*prefer='weights'"):
        read(tmp_path)
    assert read(tmp_path, prefer="config").spec.methods["a.fc"].alpha == 99
    assert read(tmp_path, prefer="weights").spec.methods["a.fc"].alpha == 16
    with pytest.raises(AdapterFileError, match="'config' or 'weights'"):
        read(tmp_path, prefer="both")  # type: ignore[arg-type]


def test_a_configuration_of_another_adapter_is_found_out(tmp_path: Path) -> None:
    write(adapter(2), tmp_path / "a")
    write(adapter(2, native=True), tmp_path / "b")
    (tmp_path / "a" / CONFIG).write_bytes((tmp_path / "b" / CONFIG).read_bytes())
    with pytest.raises(AdapterFileError, match="not the configuration that the weights were saved with"):
        read(tmp_path / "a")


def test_what_peft_saves_over_ours_is_peft(tmp_path: Path) -> None:
    write(adapter(2, task="sql"), tmp_path)
    peft_file(tmp_path / "other", adapter(1))
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    state = read(tmp_path)
    assert state.spec.methods == adapter(1).spec.methods
    assert "task" not in state.spec.info


# ---- pickles ---------------------------------------------------------------------------------------------------------
def as_pickle(directory: Path, content: Any) -> Path:
    (directory / WEIGHTS).unlink()
    torch.save(content, directory / "adapter_model.bin")
    return directory


def test_a_pickle_needs_to_be_asked_for(tmp_path: Path) -> None:
    state = adapter()
    write(state, tmp_path)
    as_pickle(tmp_path, load_file(tmp_path / WEIGHTS))
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(AdapterFileError, match="allow_pickle=True"):
            read(path)
        again = read(path, allow_pickle=True)
        assert_equal(
            AdapterState(AdapterSpec(again.spec.methods, again.spec.shapes, again.spec.base), again.tensors),
            state,
        )


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("content", [Evil(), {"a": Evil()}, [1], {"a": 1}, {1: torch.ones(1)}])
def test_a_pickle_of_more_than_tensors(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(adapter(), tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin"):
        read(as_pickle(tmp_path, content), allow_pickle=True)
    assert not capsys.readouterr().out


def test_a_damaged_pickle(tmp_path: Path) -> None:
    write(adapter(), tmp_path)
    as_pickle(tmp_path, {})
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(AdapterFileError, match="damaged"):
        read(tmp_path, allow_pickle=True)


# ---- the two forms ---------------------------------------------------------------------------------------------------
def test_the_form_and_the_reason(tmp_path: Path) -> None:
    assert why_not_peft(adapter()) == []
    reasons = why_not_peft(adapter(native=True))
    assert "2 groups" in reasons[0]
    assert (tmp_path / "new" / "dir") == write(adapter(native=True), tmp_path / "new" / "dir")
    config = json.loads((tmp_path / "new" / "dir" / CONFIG).read_text())
    assert config["peft_type"] == "LORAKIT"
    assert config["lorakit"]["why_not_peft"] == reasons


def test_peft_stops_at_our_form(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write(adapter(native=True), tmp_path)
    with pytest.raises(Exception, match="LORAKIT"):
        peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(6, 4)), tmp_path)


def test_non_finite_numbers_are_kept_and_can_be_asked_for(tmp_path: Path) -> None:
    state = adapter()
    state.tensors["a.fc"]["lora_B"][0, 0] = float("nan")
    again = read(write(state, tmp_path))
    assert again.non_finite() == ["a.fc:lora_B"]


def test_the_json_looks_as_peft_writes_it(tmp_path: Path) -> None:
    write(adapter(), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_info_that_is_no_json_leaves_the_old_adapter(tmp_path: Path) -> None:
    write(adapter(1), tmp_path)
    with pytest.raises(AdapterFileError, match="plain JSON"):
        write(adapter(2, task=object()), tmp_path)
    with pytest.raises(AdapterFileError, match="plain JSON"):
        write(adapter(2, native=True, task=object()), tmp_path)
    assert_equal(read(tmp_path), adapter(1))


def test_a_dora_of_a_dora_free_set_is_one_form_only(tmp_path: Path) -> None:
    shape = Shape("linear", 4, 6)
    methods = {"a.fc": LoRA(r=2), "b.fc": DoRA(LoRA(r=2))}
    state = AdapterState(
        AdapterSpec(methods, dict.fromkeys(methods, shape)),
        {p: {n: torch.randn(s) for n, s in m.shapes(shape).items()} for p, m in methods.items()},
    )
    assert why_not_peft(state) == [
        "PEFT has either LoRA or DoRA for all targets of an adapter; this one has both"
    ]
    assert_equal(read(write(state, tmp_path)), state)
