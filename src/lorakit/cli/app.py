"""The program: its commands, and what happens to their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from lorakit.cli import (
    chat,
    check,
    classify,
    combine,
    convert,
    demo,
    diff,
    doctor,
    estimate,
    evaluate,
    export,
    extract,
    generate,
    inspect,
    kernels,
    merge,
    models,
    plan,
    preview,
    resize,
    resume,
    schema,
    serve,
    sign,
    train,
    version,
)
from lorakit.cli.recipe_options import RecipeCommand
from lorakit.errors import LorakitError

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]lorakit demo[/bold]: a real model learns SQL in a few minutes, without a GPU.",
)


@app.callback()
def _lorakit(
    debug: bool = typer.Option(
        False, "--debug", help="Show the whole traceback of an error; may stand anywhere."
    ),
) -> None:
    """Fine-tune a model with LoRA and its family: train from a recipe, score, ask, merge, look inside."""


app.command("demo")(demo.command)
app.command("train", cls=RecipeCommand)(train.command)
app.command("resume")(resume.command)
app.command("check", cls=RecipeCommand)(check.command)
app.command("preview", cls=RecipeCommand)(preview.command)
app.command("estimate", cls=RecipeCommand)(estimate.command)
app.command("eval", cls=RecipeCommand)(evaluate.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("classify")(classify.command)
app.command("merge")(merge.command)
app.command("export")(export.command)
app.command("inspect")(inspect.command)
app.command("diff")(diff.command)
app.command("combine")(combine.command)
app.command("resize")(resize.command)
app.command("extract")(extract.command)
app.command("convert")(convert.command)
app.command("sign")(sign.sign_command)
app.command("verify")(sign.verify_command)
app.command("plan")(plan.command)
app.command("models")(models.command)
app.command("doctor")(doctor.command)
app.command("schema")(schema.command)
app.add_typer(kernels.app, name="kernels")
app.command("version")(version.command)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return the exit code: 0, 2 for a mistake or an error that is explained, 130 after Ctrl-C."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for i, word in enumerate(words) if i >= end or word != "--debug"]
    _quiet_libraries()
    try:
        code = app(args=words, prog_name="lorakit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LorakitError as error:
        if debug:
            raise
        return _fail(str(error))
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\nStopped.\n")
        return 130
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except Exception as error:
        show = getattr(error, "show", None)  # a mistake on the command line, which typer words
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))


def _fail(message: str) -> int:
    sys.stderr.write(f"lorakit: {message}\n")
    return 2


def _quiet_libraries() -> None:
    """Keep other libraries' bars and advice out of the output, unless the user asked for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
