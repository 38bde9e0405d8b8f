"""The command line. Importing it is cheap: what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDS = ("typer", "rich", "pydantic", "yaml", "transformers", "accelerate")


def main() -> None:
    """Run the command line, as the program `lorakit` and ``python -m lorakit``."""
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        sys.stderr.write(
            f"The lorakit command line needs packages that are not installed ({', '.join(missing)}).\n"
            "Install them with: pip install 'lorakit[train]'\n"
        )
        sys.exit(2)
    from lorakit.cli.app import run
    from lorakit.cli.lean_start import claim_process

    claim_process()
    sys.exit(run(sys.argv[1:]))
