"""Which method learns what: every method fine-tunes the real MiniLM encoder on a slice of TREC, beside a frozen body.

    python -m benchmarks.trec --data DIR

DIR holds ``train``, ``valid`` and ``test.jsonl.gz`` with the keys ``text_a`` and ``label_name`` (TREC: kinds of
questions, six classes). Training rows are the first ``--rows``; ``valid`` and ``test`` are scored together. Results go
to ``--out``, one JSON file a method; what is there already is not run again. ``--page`` writes the table into
``docs/methods/trec.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.study.comparison import Setting, compare, markdown

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "methods" / "trec.md"
BEGIN, END = "<!-- trec: begin -->", "<!-- trec: end -->"

# Learning rates, by what is trained: the whole model takes small steps, a few vectors take large ones. One or two
# values of each were tried on 600 rows and three passes, so that every method learns; none was searched for.
WHOLE, STARTED, NETWORK, FACTORS, BIASES, SLOW, VECTORS, HEAD = 1e-4, 5e-4, 6e-4, 2e-3, 5e-3, 1e-2, 2e-2, 1e-1


def low_rank(
    lr: float = FACTORS,
    *,
    train: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    **adapter: Any,
) -> dict[str, Any]:
    """A method of rank 8 on all linear layers of the body."""
    section = {"method": "lora", "r": 8, "alpha": 16, **adapter}
    return {"adapter": section, "train": {"lr": lr, **(train or {})}, "model": model or {}}


def other(
    method: str, lr: float, *, train: Mapping[str, Any] | None = None, **adapter: Any
) -> dict[str, Any]:
    """A method with settings of its own."""
    return {"adapter": {"method": method, **adapter}, "train": {"lr": lr, **(train or {})}}


SETTINGS = [
    Setting("frozen body, head alone", **other("full", HEAD, targets=["classifier"])),
    Setting("full fine-tuning", **other("full", WHOLE)),
    Setting("BitFit", **other("bitfit", BIASES)),
    Setting("LoRA", **low_rank()),
    Setting("rsLoRA", **low_rank(scaling="rslora")),
    Setting("LoRA+", **low_rank(STARTED, train={"lora_plus_ratio": 16.0})),
    Setting("DoRA", **low_rank(method="dora")),
    Setting("AdaLoRA", **other("adalora", SLOW, init_r=12, target_r=8, alpha=16)),
    Setting("QLoRA (NF4)", **low_rank(model={"quantize": "nf4"})),
    Setting("LoRA on int8", **low_rank(model={"quantize": "int8"})),
    Setting("LoftQ (NF4)", **low_rank(model={"quantize": "nf4"}, loftq_iterations=5)),
    Setting("PiSSA", **low_rank(STARTED, init="pissa")),
    Setting("OLoRA", **low_rank(STARTED, init="olora")),
    Setting("EVA", **low_rank(init="eva")),
    Setting("LoRA-GA", **low_rank(STARTED / 2, init="lora_ga", scaling="rslora")),
    Setting("orthogonal start", **low_rank(init="orthogonal")),
    Setting("LoRA-FA", **low_rank(method="lora_fa")),
    Setting("VeRA", **other("vera", VECTORS)),
    Setting("LoHa", **low_rank(method="loha", r=4)),
    Setting("LoKr", **low_rank(SLOW, method="lokr")),
    Setting("DyLoRA", **low_rank(method="dylora", alpha=8, frozen_below=False), ranks=(1, 2, 4, 8)),
    Setting("Houlsby adapters", **other("houlsby", FACTORS)),
    Setting("Pfeiffer adapters", **other("pfeiffer", BIASES)),
    Setting("parallel adapters", **other("parallel", FACTORS, size=64)),
    Setting("prefix tuning", **other("prefix", VECTORS, length=16)),
    # The network wants small steps and the fresh head large ones: the head, a trained copy, has a rate of its own.
    Setting(
        "prefix tuning with its MLP",
        **other("prefix", NETWORK, length=16, mlp=384, train={"lora_plus_ratio": 50.0, "fast": ["copy"]}),
    ),
    Setting("prompt tuning", **other("prompt", VECTORS, length=16)),
    Setting("IA3", **other("ia3", VECTORS)),
]
"""One line a method; the recipe's own words."""


def common(data: Path, *, rows: int, epochs: float, model: str) -> dict[str, Any]:
    """What all recipes share."""
    files = {split: str(data / f"{split}.jsonl.gz") for split in ("train", "valid", "test")}
    return {
        "task": "classification",
        "model": {"name": model},
        "data": {**files, "text": "text_a", "label": "label_name", "max_rows": {"train": rows}},
        "train": {"epochs": epochs, "batch_rows": 16, "warmup": 0.1, "schedule": "linear"},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trec", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the folder with TREC's files"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/trec"), metavar="DIR", help="where results go")
    parser.add_argument("--rows", type=int, default=600, help="rows to train on (600)")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over them (3)")
    parser.add_argument("--model", default="minilm", help="the base model (minilm)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the list, only these methods")
    parser.add_argument("--page", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    from lorakit.train import progress_for

    logging.disable_progress_bar()
    chosen = select(options.only)
    shared = common(options.data, rows=options.rows, epochs=options.epochs, model=options.model)
    outcomes, failed = compare(chosen, shared, options.out, splits=("valid", "test"), progress=progress_for())
    text = markdown(outcomes)
    print(text)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    if options.page:
        PAGE.write_text(between_markers(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
        print(f"wrote {PAGE}")
    if failed:
        sys.exit("\n".join(["These did not run:", *(f"  {name}: {why}" for name, why in failed.items())]))


def select(names: Sequence[str] | None) -> list[Setting]:
    """The settings of these names, in the order of the list; all of them without names."""
    known = {setting.name: setting for setting in SETTINGS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        sys.exit(f"There is no method {unknown[0]!r} in the list. It has: {', '.join(known)}.")
    return [setting for setting in SETTINGS if names is None or setting.name in names]


def between_markers(page: str, text: str) -> str:
    """The page with the text in place of what stood between its markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        sys.exit(f"The page must hold the lines {BEGIN} and {END} once each, in this order.")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
