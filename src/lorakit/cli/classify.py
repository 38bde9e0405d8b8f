"""``lorakit classify``: label texts with a trained classifier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, a built-in name (minilm), or a hub id (org/name).")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Folder of an adapter that was trained with task: classification, or of its run.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="What to classify; as often as needed.")
    ] = None,
    second: Annotated[
        list[str] | None,
        typer.Option("--second", help="The second text of each pair, in the order of --text."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Classify every line of this file; a tab separates pairs."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print every label's probability as JSON.")] = False,
) -> None:
    """Label texts with a classifier: a base model and an adapter, or a merged model.

    Without --text and --file the texts are read from standard input, one a line.

    [bold]Examples[/bold]

        lorakit classify minilm --adapter runs/trec/adapter --text "Who wrote Hamlet ?"
        lorakit classify models/minilm-trec --file questions.txt --json
        lorakit classify ./base -a runs/pairs/adapter -t "It rains." --second "It is wet."
    """
    from lorakit.cli.output import quiet_loading, say, say_json
    from lorakit.errors import ConfigError, DataError
    from lorakit.io.model_files import load
    from lorakit.models import load_classifier, load_tokenizer, resolve
    from lorakit.train import classify
    from lorakit.train.classifying import adapter_labels
    from lorakit.train.run_adapter import adapter_for

    if second is not None and len(second) != len(text or []):
        raise ConfigError(f"{len(second)} --second for {len(text or [])} --text: give one for each.")
    asked = _texts(text or [], second, file)
    if not asked:
        raise DataError("There is nothing to classify: give --text, --file, or lines on standard input.")
    if adapter is not None:
        adapter = adapter_for(adapter, "labels no texts", "sequence-classification")
    labels = None if adapter is None else adapter_labels(adapter)
    if adapter is not None and labels is None:
        raise ConfigError(
            f"{adapter} was not trained with task: classification, so it names no labels. "
            "For an adapter that writes answers use lorakit generate; one of another task is scored with lorakit eval."
        )
    quiet_loading()
    resolved = resolve(model)
    tokenizer, loaded = load_tokenizer(resolved), load_classifier(resolved, labels, dtype=dtype).model
    if adapter is not None:
        load(loaded, adapter)
    found = classify(loaded, tokenizer, asked)
    if as_json:
        say_json(
            [
                {"text": one, "label": p.label, "probabilities": p.probabilities}
                for one, p in zip(asked, found, strict=True)
            ]
        )
        return
    width = max(len(p.label) for p in found)
    for one, p in zip(asked, found, strict=True):
        say(
            f"{p.label.ljust(width)}  {p.probability:.3f}  {one if isinstance(one, str) else ' | '.join(one)}"
        )


def _texts(given: list[str], second: list[str] | None, file: Path | None) -> list[str | tuple[str, str]]:
    """What to classify, each a text or a pair."""
    texts: list[str | tuple[str, str]] = list(given if second is None else zip(given, second, strict=True))
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    if not given and file is None and not sys.stdin.isatty():
        lines = sys.stdin.read().splitlines()
    for line in lines:
        one, tab, two = line.partition("\t")
        if line.strip():
            texts.append((one, two) if tab else one)
    return texts
