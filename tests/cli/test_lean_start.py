"""Training starts without packages that transformers imports wherever they are installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from lorakit.cli import lean_start

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PACKAGES = [package for package in ("peft", "datasets", "scipy") if find_spec(package) is not None]


def told(program: str) -> list[str]:
    """The words that a program prints in a fresh process."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not PACKAGES, reason="none of the packages is installed")
def test_our_own_program_imports_none_of_them_and_others_are_told_the_truth() -> None:
    program = f"""
import sys
from lorakit.cli import lean_start
lean_start.claim_process()
lean_start.import_trainer()
import transformers.utils as asked
from lorakit.train.loop import AdapterTrainer
import transformers.trainer_utils as trainer_utils
import torch
assert trainer_utils.unwrap_peft_model(torch.nn.Linear(1, 1)) is not None
for package in {PACKAGES!r}:
    assert package not in sys.modules, package
    assert getattr(asked, f"is_{{package}}_available")(), package
    __import__(package)
    print(package)
"""
    assert told(program) == PACKAGES


def test_another_program_is_left_as_it_is() -> None:
    program = """
import sys
from lorakit.cli import lean_start
lean_start.import_trainer()
print("transformers" in sys.modules)
"""
    assert told(program) == ["False"]


def test_only_the_modules_that_are_named_hear_no() -> None:
    answer = lean_start._hidden_from(("transformers.trainer", "transformers.loss."), lambda: True)

    def asked_by(module: str) -> bool:
        found: bool = eval("answer()", {"answer": answer, "__name__": module})
        return found

    hidden = ["transformers.trainer", "transformers.loss.loss_utils"]
    assert [asked_by(module) for module in hidden] == [False, False]
    shown = ["transformers.trainer_callback", "transformers.lossless", "somebody"]
    assert [asked_by(module) for module in shown] == [True, True, True]


def test_what_is_not_installed_stays_so() -> None:
    answer = lean_start._hidden_from(("transformers.trainer",), lambda: False)
    assert answer() is False
