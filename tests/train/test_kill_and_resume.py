"""A run that is killed with -9, wherever it is, ends as the run that was not: adapter, best one, patience, metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import TrainingError
from lorakit.ops.native import load
from lorakit.train import Recipe, TrainResult, read_metrics, train
from lorakit.train.run_files import checkpoints
from tests.tiny_chat import colour_rows, write_rows
from tests.train.test_trainer import StopAt, assert_equal

MakeRecipe = Callable[..., Recipe]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")

POINTS = 5
# Counts what the run does to files in its output, and kills itself at the given one. The first run counts them all.
SCRIPT = """
    import json, os, random, signal, sys
    from pathlib import Path
    from lorakit.train import Recipe, train
    import lorakit.train.loop, lorakit.train.reporting, lorakit.models.load  # before the processes part

    plan, folder, points = json.load(open(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])

    def child(number, at):
        output = str(folder / f"run-{number}")
        seen = 0
        def hook(event, given):
            nonlocal seen
            writing = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
                event == "open" and isinstance(given[1], str) and given[1][0] in "wxa"
            )
            if writing and str(given[0]).startswith(output):
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        train(Recipe.from_mapping({**plan, "output": output}))
        (folder / "count").write_text(str(seen))
        os._exit(0)

    def run(number, at):
        process = os.fork()
        if process == 0:
            try:
                child(number, at)
            finally:
                os._exit(7)
        return os.waitpid(process, 0)[1]

    assert run(0, -1) == 0
    total = int((folder / "count").read_text())
    chosen = sorted(random.Random(0).sample(range(2, total), points))
    killed = {}
    for number, at in enumerate(chosen, 1):
        killed[number] = [at, os.WTERMSIG(run(number, at))]
    json.dump({"total": total, "killed": killed}, open(folder / "killed.json", "w"))
"""


@pytest.fixture(autouse=True)
def _the_same_products_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled product rounds otherwise; it may be built between one process and the next."""
    monkeypatch.setenv("LORAKIT_KERNELS", "off")
    load.forget()
    yield
    monkeypatch.undo()
    load.forget()


@pytest.fixture
def watched(recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes that keep the best adapter, with dropout, accumulation and a checkpoint every second step."""
    write_rows(tmp_path / "train.jsonl", colour_rows(24))
    write_rows(tmp_path / "valid.jsonl", colour_rows(30)[24:])
    data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "valid.jsonl")}
    sections = {"data": data, "adapter": {"r": 4, "dropout": 0.3}}

    def make(output: str, **train: Any) -> Recipe:
        settings = {
            "max_steps": 9, "save_every": 2, "eval_every": 2, "log_every": 3, "accumulation": 2, "lr": 3e-2,
        }  # fmt: skip
        return recipe(output, sections=sections, **{**settings, **train})

    return make


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "second" not in k and k != "peak_memory"} for line in lines]


def assert_same_run(resumed: TrainResult, whole: Path) -> None:
    assert_equal(resumed.adapter, whole / "adapter")
    weights = "adapter_model.safetensors"
    assert (resumed.adapter / weights).read_bytes() == (whole / "adapter" / weights).read_bytes()
    assert (resumed.folder / "best" / weights).read_bytes() == (whole / "best" / weights).read_bytes()
    assert (resumed.folder / "best.json").read_text() == (whole / "best.json").read_text()
    assert timeless(resumed.folder) == timeless(whole)
    ended = json.loads((whole / "run.json").read_text(encoding="utf-8"))["ended"]
    again = json.loads((resumed.folder / "run.json").read_text(encoding="utf-8"))["ended"]
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in ended.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }


@pytest.mark.parametrize(
    ("settings", "how"), [({}, "finished"), ({"patience": 1, "min_improvement": 100.0}, "patience")]
)
def test_killed_anywhere(watched: MakeRecipe, tmp_path: Path, settings: dict[str, Any], how: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(watched("run-0", **settings).plain()), encoding="utf-8")
    words = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        str(tmp_path / "plan.json"),
        str(tmp_path),
        str(POINTS),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "run-0"
    assert json.loads((whole / "run.json").read_text(encoding="utf-8"))["ended"]["how"] == how
    killed = json.loads((tmp_path / "killed.json").read_text(encoding="utf-8"))["killed"]
    assert {number for _, number in killed.values()} == {signal.SIGKILL}
    resumed = 0
    for number in killed:
        made = watched(f"run-{number}", **settings)
        if checkpoints(made.output):
            resumed += 1
            result = train(made, resume=True)
        else:
            with pytest.raises(TrainingError, match="nothing to resume"):
                train(made, resume=True)
            result = train(made, overwrite=True)
        assert_same_run(result, whole)
    assert resumed >= POINTS // 2


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_ctrl_c_where_a_measurement_is_due(watched: MakeRecipe, stop: int) -> None:
    """Ctrl-C does not wait for the valid split; what was due there is measured when the run goes on."""
    whole = train(watched("whole", patience=2))
    train(watched("parts", patience=2), progress=StopAt(stop))
    steps = [
        line["step"]
        for line in read_metrics(watched("parts").output / "metrics.jsonl")
        if "valid_loss" in line
    ]
    assert steps == [step for step in (2, 4) if step < stop]
    assert_same_run(train(watched("parts", patience=2), resume=True), whole.folder)


def test_many_short_lives(watched: MakeRecipe) -> None:
    whole = train(watched("whole"))
    result = train(watched("parts"), progress=StopAt(1))
    for stop in range(2, 9):
        result = train(watched("parts"), resume=True, progress=StopAt(stop))
        assert result.steps == stop
    assert_same_run(train(watched("parts"), resume=True), whole.folder)


def test_the_same_seed_gives_the_same_bytes_everywhere(watched: MakeRecipe) -> None:
    one, other = train(watched("one")), train(watched("other"))
    for file in (
        "adapter/adapter_model.safetensors",
        "best/adapter_model.safetensors",
        "best.json",
        "adapter/README.md",
    ):
        assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes(), file
