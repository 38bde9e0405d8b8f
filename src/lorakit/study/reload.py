"""Answer the first questions of a recipe with a saved adapter, in a process of its own; prints one line of JSON.

``python -m lorakit.study.reload RECIPE ADAPTER COUNT``: how `lorakit.study.demo` shows that what was saved is all that
is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lorakit.train import Recipe, evaluate


def answers(recipe: Path, adapter: Path, count: int) -> list[str]:
    """The answers, in the order of the test split."""
    result = evaluate(Recipe.from_file(recipe), adapter=adapter, limit=count)
    return [answer.answer for answer in result.answers]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answers(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))) + "\n")
