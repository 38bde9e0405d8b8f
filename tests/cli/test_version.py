"""``lorakit version``."""

from __future__ import annotations

import json

import pytest
import torch

import lorakit as lk
from lorakit.ops.native import load
from tests.cli.conftest import Lorakit


def test_versions(lorakit: Lorakit) -> None:
    assert lorakit("version").out.splitlines()[0] == f"lorakit {lk.__version__}"
    assert json.loads(lorakit("version", "--json").out)["torch"] == torch.__version__


def test_it_tells_whether_the_kernels_are_used(lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_KERNELS", "off")
    load.forget()
    assert "kernels off (LORAKIT_KERNELS=off)" in lorakit("version").out.splitlines()
    monkeypatch.delenv("LORAKIT_KERNELS")
    load.forget()
    assert json.loads(lorakit("version", "--json").out)["kernels"] == str(load.status())
