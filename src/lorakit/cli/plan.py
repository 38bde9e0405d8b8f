"""``lorakit plan``: what a run will cost, from a config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorakit.core import Method
    from lorakit.plan import Plan, Run
    from lorakit.plan.fit import Fit


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="A shipped config (see --models), a folder with a config.json, or such a file."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="Any registered method: lora, dora, vera, ia3, full ...")
    ] = "lora",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="A setting of the method, as in a recipe; as often as needed.",
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", help="Short for --set r=N. With --fit the rank that is to be kept.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            "-t",
            help="Names with commas in between (q_proj,v_proj), a preset, or a regular expression.",
        ),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", help="What to leave out, in the same form.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="causal-lm, seq2seq, sequence-classification, feature-extraction; else as the config says.",
        ),
    ] = None,
    labels: Annotated[
        int | None, typer.Option("--labels", help="Classes of a fresh classification head.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Rows in a micro-batch.")] = 1,
    length: Annotated[
        int | None, typer.Option("--length", "-l", help="Tokens in a row (default 512).")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cuda or cpu: whose kernels, and the default dtype.")
    ] = "cuda",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the base: bfloat16 (default on cuda), float16, float32.")
    ] = "",
    adapter_dtype: Annotated[str, typer.Option("--adapter-dtype", help="Of the adapter.")] = "float32",
    four_bit: Annotated[
        bool, typer.Option("--4bit", help="Linear layers of the base in NF4, as QLoRA.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again in backward.")
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing", help="The rows of a batch in one row, nothing padded.")
    ] = False,
    learnt: Annotated[
        float, typer.Option("--learnt", help="Share of positions that are learnt: 1 for plain text.")
    ] = 1.0,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Micro-batches for a step.")] = 1,
    adapters: Annotated[int, typer.Option("--adapters", help="Adapters in memory in inference.")] = 1,
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="SIZE", help="Propose r, batch and length for a memory of 24GB."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Published counts beside those counted here, and stop.")
    ] = False,
    models: Annotated[bool, typer.Option("--models", help="List the shipped configs, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what a run will cost, before anything is downloaded: counts, file sizes, memory.

    Only a config is needed. The step is rehearsed with the model's own code on tensors without numbers, and its peak is
    read off; every assumption is printed. How plans compare with measured peaks: docs/planner.md.

    [bold]Examples[/bold]

        lorakit plan llama-2-7b --r 8 --targets q_proj,v_proj
        lorakit plan llama-3-8b --r 16 --batch 4 --length 2048 --checkpointing --4bit
        lorakit plan path/to/config.json --method dora --set inner=lora --set r=32 --json
        lorakit plan qwen2.5-3b --fit 24GB
        lorakit plan mistral-7b --adapters 100 --length 4096
    """
    from lorakit.cli.output import say_json, say_table

    if models:
        from lorakit.plan import architectures

        shipped = architectures()
        if as_json:
            say_json(shipped)
        else:
            say_table("", ("name", "what"), [[name, about] for name, about in shipped.items()], left=2)
        return
    if published:
        _say_published(as_json)
        return
    if model is None:
        raise typer.BadParameter(
            "Name a model: a shipped config (lorakit plan --models), a folder, or a config.json."
        )
    from lorakit.plan import Run, architecture, plan
    from lorakit.plan.fit import fit as fit_to
    from lorakit.plan.fit import size_of

    made = _method(method, [*(settings or []), *([] if r is None else [f"r={r}"])])
    run = Run(
        batch, 512 if length is None else length, device, dtype, adapter_dtype,  # type: ignore[arg-type]
        "nf4" if four_bit else "dense", checkpointing, packing, learnt, accumulation, adapters,
    )  # fmt: skip
    base = architecture(model, task=task, num_labels=labels)  # type: ignore[arg-type]
    chosen, left_out = _selector(targets), _selector(exclude)
    if fit is not None:
        found = fit_to(
            base, made, size_of(fit), chosen, exclude=left_out, run=run,
            rank=r is None and not any(s.startswith("r=") for s in settings or []),
            lengths=None if length is None else [length],
        )  # fmt: skip
        if as_json:
            say_json(found.plain())
        else:
            _say_fit(base.name, found)
        return
    planned = plan(base, made, chosen, exclude=left_out, run=run)
    if as_json:
        say_json(planned.plain())
    else:
        _say(planned)


def _method(name: str, settings: list[str]) -> Method:
    """The method as a recipe's ``adapter`` section with these keys would make it."""
    import yaml
    from pydantic import ValidationError

    from lorakit.errors import ConfigError, near_matches
    from lorakit.train.method_settings import MethodSection, method_section

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"A setting is written KEY=VALUE; got {setting!r}.")
        values[key] = yaml.safe_load(value)
    section = method_section(name, MethodSection, values.get("inner"))
    odd = [key for key in values if key not in section.settings]
    if odd:
        raise ConfigError(
            f"{name} has no setting {odd[0]!r}.{near_matches(odd[0], section.settings)} "
            f"It has: {', '.join(section.settings) or 'none'}."
        )
    try:
        return section(method=name, **values).build()
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _selector(text: str | None) -> str | list[str] | None:
    """Names with commas are a list; what has a sign of a regular expression, and a preset, stay one string."""
    if text is None or text.startswith("all-") or any(sign in text for sign in "*+?|\\^$("):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _say(planned: Plan) -> None:
    from lorakit.cli.output import say, say_pairs, say_table, size

    counts, run = planned.counts, planned.run
    say_pairs(
        f"{planned.architecture.name}: {planned.architecture.about}",
        [
            ("base", f"{counts.base:,} parameters, {size(planned.weights.total)} in memory"),
            ("adapter", f"{counts.stored:,} parameters at {len(counts.sites):,} targets"),
            ("trainable", f"{counts.trainable:,} of {counts.total:,} ({100 * counts.share:.4f} %)"),
            (
                "file",
                f"{size(planned.file_bytes('float32'))} in float32, {size(planned.file_bytes('bfloat16'))} in bfloat16",
            ),
        ],
    )
    rows = [
        [
            ending, method, shape, f"{len(sites):,}", f"{sites[0].stored:,}",
            f"{sum(s.stored for s in sites):,}", f"{sum(s.trainable for s in sites):,}",
        ]
        for (ending, shape, method), sites in counts.groups().items()
    ]  # fmt: skip
    if counts.shared:
        rows.append(["(shared by all)", "", "", "", "", f"{counts.shared:,}", f"{counts.shared_trainable:,}"])
    say_table("", ("target", "method", "size", "sites", "each", "stored", "trainable"), rows, left=3)
    if planned.training is not None and planned.inference is not None:
        training, inference = planned.training, planned.inference
        say_table(
            "",
            (f"training, {_how(run)}", "peak"),
            [
                ["weights", size(training.weights)],
                ["adapter", size(training.adapter)],
                ["gradients", size(training.gradients)],
                ["optimizer", size(training.optimizer)],
                ["activations", size(training.activations)],
                ["total", size(training.total)],
            ],
        )
        say_table(
            "",
            (f"inference, {run.adapters} adapters, {run.batch} x {run.length:,} tokens", "peak"),
            [
                ["weights", size(inference.weights)],
                ["adapters", size(inference.adapters)],
                ["key-value cache", size(inference.cache)],
                ["working", size(inference.working)],
                ["total", size(inference.total)],
            ],
        )
    say("Assumed:")
    for line in planned.assumptions:
        say(f"  - {line}")


def _how(run: Run) -> str:
    words = [f"{run.batch} x {run.length:,} tokens"]
    words += ["4-bit base"] if run.storage == "nf4" else []
    words += [word for word in ("checkpointing", "packing") if getattr(run, word)]
    return ", ".join(words)


def _say_fit(name: str, found: Fit) -> None:
    from lorakit.cli.output import say, say_table, size
    from lorakit.plan.fit import MARGIN

    rows = [
        [
            "4 bits" if option.run.storage == "nf4" else option.run.base_dtype,
            "yes" if option.run.checkpointing else "no",
            f"{option.run.length:,}",
            f"{option.run.batch:,}" if option.fits else "none",
            size(option.total),
        ]
        for option in found.options
    ]
    say_table("", ("base", "checkpointing", "length", "largest batch", "peak"), rows, left=2)
    say(
        f"Of {size(found.limit)}, {size(found.usable)} were used: {MARGIN:.0%} is left for what a plan does not see."
    )
    if found.proposal is None:
        say(f"{name} does not fit: the last column says what a batch of 1 (or the weights alone) would take.")
        return
    run, r = found.proposal.run, getattr(found.method, "r", None)
    rank = "" if r is None else f"r={r}, "
    options = (" --4bit" if run.storage == "nf4" else "") + (" --checkpointing" if run.checkpointing else "")
    say(f"Proposed: {rank}batch={run.batch}, length={run.length:,}{', 4-bit base' if run.storage == 'nf4' else ''}"
        f"{', checkpointing' if run.checkpointing else ''}: {size(found.proposal.total)}.")  # fmt: skip
    say(
        f"Look closer: lorakit plan {name}{'' if r is None else f' --r {r}'} "
        f"--batch {run.batch} --length {run.length}{options}"
    )


def _say_published(as_json: bool) -> None:
    from lorakit.cli.output import say_json, say_table
    from lorakit.plan.published import check_published

    checked = check_published()
    if as_json:
        say_json([entry.plain() for entry in checked])
        return
    rows = [
        [
            entry.claim.setting,
            entry.claim.printed,
            f"{entry.counted:,}",
            "yes" if entry.claim.agrees else "NO",
            entry.claim.why,
        ]
        for entry in checked
    ]
    say_table("", ("setting", "published", "counted", "agrees", "why"), rows, left=5)
