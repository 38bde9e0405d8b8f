"""``lorakit kernels``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.errors import KernelError
from lorakit.ops.native import build, load
from tests.cli.conftest import Lorakit

pytestmark = pytest.mark.usefixtures("resolve_again")


def test_not_built_then_a_compiler_that_is_missing(
    lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "not built (run: lorakit kernels build)" in lorakit("kernels", "status").out
    failed = lorakit("kernels", "build")
    assert failed.code == 2
    assert failed.err.splitlines()[-1].startswith("lorakit: no C++ compiler was found: 'no-such-compiler'")
    assert failed.out == ""
    assert lorakit("kernels", "status").code == 0


def test_build_and_status(lorakit: Lorakit) -> None:
    try:
        build.find_compiler()
    except KernelError as error:
        pytest.skip(f"no compiled product here: {error}")
    built = lorakit("kernels", "build")  # quick: tests/ops/test_native.py or `make` has made it, or this does
    assert built.code == 0, built.err
    assert built.out == f"compiled: {load.kernel_folder()}\n"
    status = json.loads(lorakit("kernels", "status", "--json").out)
    assert status == {"state": "compiled", "reason": "", "folder": str(load.kernel_folder())}


def test_off(lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_KERNELS", "off")
    assert json.loads(lorakit("kernels", "status", "--json").out)["state"] == "off"
