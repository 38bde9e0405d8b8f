"""``lorakit convert``: an adapter from one program's file format to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[Path, typer.Argument(help="A file, or an adapter's folder.")],
    destination: Annotated[Path, typer.Argument(help="A file; for peft and native a folder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="peft, native, kohya, lycoris, diffusers, diffusers-old, diffusers-processors, cloneofsimo, "
            "loralib or gguf.",
        ),
    ],
    source_format: Annotated[
        str | None, typer.Option("--from", help="What SOURCE is; by default its keys tell.")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--names",
            help="The model's layers, for names without dots: sd15, sd2, sdxl, flux, or a file: text with a path a "
            "line, JSON, or the model's .safetensors. unet=FILE puts 'unet.' in front. May be repeated.",
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="loralib keeps none: say it.")] = None,
    slots: Annotated[
        str | None,
        typer.Option("--slots", help="loralib's enable_lora of a MergedLinear, such as 1,0,1 for q and v."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The model's folder or config.json: GGUF needs its family and heads."),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Keep one part of a pipeline: unet, text_encoder, ...")
    ] = None,
    under: Annotated[
        str | None, typer.Option("--under", help="Put the paths under a part of a pipeline: unet, ...")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Which adapter, where a folder holds several.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read a .bin or .pt file, tensors only.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert an adapter between formats. Needs no model; tensors keep their dtype and, unless it is said, every bit.

    Everything in SOURCE is read or it is an error; what the new format cannot say is listed as lost; what it could only
    say wrongly is refused. The new file is there whole or not at all.

    [bold]Examples[/bold]

        lorakit convert style.safetensors style-peft --to peft --only unet
        lorakit convert my-lora style.safetensors --to kohya --under unet
        lorakit convert style.safetensors out.safetensors --to diffusers --names sdxl
        lorakit convert roberta_base_lora_mnli.bin mnli --to native --alpha 16 --allow-pickle
        lorakit convert runs/sql/adapter sql.gguf --to gguf --config models/smollm2
    """
    from dataclasses import asdict

    from lorakit.cli.output import say_json, say_pairs, size
    from lorakit.errors import ConfigError
    from lorakit.io.formats import Hints, convert, read_names
    from lorakit.io.formats.gguf import model_facts

    parts = tuple(word.strip() for word in slots.split(",")) if slots else ()
    if set(parts) - {"0", "1"}:
        raise ConfigError(f"--slots is a list of 0 and 1, such as 1,0,1; got {slots!r}.")
    family, heads = model_facts(config) if config is not None else (None, None)
    hints = Hints(
        names=read_names(names) if names else None,
        alpha=alpha,
        slots=tuple(word == "1" for word in parts),
        family=family,
        heads=heads,
    )
    result = convert(
        source,
        destination,
        to,
        hints=hints,
        source_format=source_format,
        name=name,
        only=only,
        under=under,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
    )
    if as_json:
        say_json({**asdict(result), "path": str(result.path)})
        return
    pairs = [
        ("read as", result.source),
        ("written as", result.format),
        ("targets", f"{result.targets:,}"),
        ("parameters", f"{result.parameters:,} ({size(result.bytes)} on disk)"),
    ]
    pairs += [("not in the new file", loss) for loss in result.losses]
    if result.not_finite:
        count = len(result.not_finite)
        pairs.append(
            ("WARNING", f"{count} tensors hold a NaN or an infinity, such as {result.not_finite[0]}")
        )
    say_pairs(f"{source} -> {destination}", pairs)
