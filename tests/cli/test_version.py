"""``lorakit version``."""

from __future__ import annotations

import json

import torch

import lorakit as lk
from tests.cli.conftest import Lorakit


def test_versions(lorakit: Lorakit) -> None:
    assert lorakit("version").out.splitlines()[0] == f"lorakit {lk.__version__}"
    assert json.loads(lorakit("version", "--json").out)["torch"] == torch.__version__
