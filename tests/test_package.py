"""The package itself: quick to import, and every name it promises is there."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lorakit


@pytest.mark.parametrize("name", lorakit.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(lorakit, name).__doc__
    assert name in dir(lorakit)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'lorakit' has no attribute 'atach'"):
        lorakit.atach  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from lorakit import nothing_of_that_name  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        """
        import lorakit, sys
        assert not {"torch", "safetensors", "transformers"} & set(sys.modules)
        lorakit.LoRA()
        assert "torch" in sys.modules
        assert "transformers" not in sys.modules
        """,
        # The subpackage `lorakit.attach` must not come in the way of the function, whichever is first.
        """
        import lorakit.attach.merge
        import lorakit as lk
        assert callable(lk.attach), lk.attach
        from lorakit.attach import use
        assert lk.use is use
        """,
        """
        from lorakit import *
        assert callable(attach) and callable(find) and callable(save)
        """,
        """
        from lorakit.io import read
        from lorakit.core import METHODS
        assert {"lora", "dora", "full", "bitfit"} <= set(METHODS)
        """,
    ],
)
def test_in_a_fresh_interpreter(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_no_named_tuple_has_a_second_base() -> None:
    """Before Python 3.11 such a class cannot be made, so importing its file fails; mypy lets it pass."""
    wrong = [
        f"{file}:{node.lineno}"
        for file in Path(lorakit.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and len(node.bases) > 1
        and any(ast.unparse(base) in ("NamedTuple", "typing.NamedTuple") for base in node.bases)
    ]
    assert not wrong
