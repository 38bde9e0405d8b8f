"""The program as a whole: help, errors, exit codes, and a quick start."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from lorakit.cli import app
from lorakit.errors import LorakitError
from tests.cli.conftest import Lorakit

COMMANDS = (
    "demo",
    "train",
    "eval",
    "generate",
    "classify",
    "merge",
    "inspect",
    "models",
    "kernels",
    "version",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_lists_every_command(lorakit: Lorakit) -> None:
    outcome = lorakit("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches_by_example(lorakit: Lorakit, command: str) -> None:
    outcome = lorakit(command, "-h")
    assert outcome.code == 0
    if command != "version":
        assert "Examples" in outcome.out
        assert f"lorakit {command} " in outcome.out


def test_help_imports_neither_torch_nor_transformers() -> None:
    done = python("""
        import sys
        from lorakit.cli.app import run
        for words in (["--help"], ["merge", "--help"], ["inspect", "--help"]):
            run(words)
        heavy = {"torch", "transformers", "matplotlib", "safetensors"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert done.returncode == 0, done.stderr


def test_an_error_of_ours_is_one_message_and_the_traceback_on_demand(lorakit: Lorakit) -> None:
    outcome = lorakit("train", "no-such-recipe.yaml")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("lorakit: There is no recipe no-such-recipe.yaml")
    assert "Traceback" not in outcome.err
    with pytest.raises(LorakitError):
        lorakit("train", "no-such-recipe.yaml", "--debug")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--sett"], "--sett"),
        (["train"], "RECIPE"),
        (["merge", "m"], "--out"),
        (["merge", "m", "--out", "x"], "Name a base and an adapter"),
    ],
)
def test_mistakes_on_the_command_line(lorakit: Lorakit, words: list[str], message: str) -> None:
    outcome = lorakit(*words)
    assert outcome.code == 2
    assert message.lower() in outcome.err.lower()
    assert "Traceback" not in outcome.err


def test_ctrl_c_and_a_full_disk(lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> None:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(app, "app", fail)

    raising(KeyboardInterrupt())
    assert lorakit("train", "x").code == 130
    raising(OSError(28, "No space left on device", "/big/file"))
    outcome = lorakit("train", "x")
    assert (outcome.code, outcome.err) == (2, "lorakit: No space left on device: /big/file\n")


def test_without_the_extra_it_says_what_to_install() -> None:
    done = python("""
        import importlib.util, sys
        from lorakit import cli
        real = importlib.util.find_spec
        cli.find_spec = lambda name: None if name in ("typer", "transformers") else real(name)
        cli.main()
    """)
    assert done.returncode == 2
    assert "(typer, transformers)" in done.stderr
    assert "pip install 'lorakit[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "version"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.startswith("lorakit ")
