"""The tasks are pure Python: they import the standard library and lorakit's errors, nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import lorakit.tasks


def test_only_the_standard_library_is_imported():
    files = list(Path(lorakit.tasks.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in names:
                own = name.startswith("lorakit.tasks") or name == "lorakit.errors"
                assert own or name.split(".")[0] in sys.stdlib_module_names, f"{file.name} imports {name}"
