"""``lorakit generate``: ask a model something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a built-in name (smollm2), or a hub id (org/name).")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="Folder of an adapter to use, or of a run.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to ask; as often as needed.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Ask every line of this file.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before each prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", "-t", min=0, help="0 takes the likeliest token; above, tokens are drawn."
        ),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this share.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 for all.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawing.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print prompts and answers as JSON.")] = False,
) -> None:
    """Answer prompts with a model, and an adapter on it.

    Without --prompt and --file the prompt is read from standard input. Prompts are rendered as in training, with the
    model's own chat template.

    [bold]Examples[/bold]

        lorakit generate smollm2 -p "Name three rivers."
        lorakit generate smollm2 --adapter runs/e2e_nlg/adapter --file prompts.txt --json
        echo "Tell me a story." | lorakit generate ./my-model --temperature 0.8 --top-p 0.95
    """
    from lorakit.cli.output import quiet_loading
    from lorakit.errors import ConfigError, DataError
    from lorakit.io.model_files import load
    from lorakit.models import has_encoder_and_decoder, load_model, load_tokenizer, resolve
    from lorakit.models.chat_template import adopt_template
    from lorakit.train import generate
    from lorakit.train.generation import generate_from_sources
    from lorakit.train.recipe import GenerateSection
    from lorakit.train.run_adapter import adapter_for

    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p is a share above 0 and up to 1; got {top_p}.")
    prompts = _prompts(prompt or [], file)
    if not prompts:
        raise DataError("There is nothing to answer: give --prompt, --file, or text on standard input.")
    settings = GenerateSection(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    if adapter is not None:
        adapter = adapter_for(adapter, "writes no texts", "causal-lm", "seq2seq")
    quiet_loading()
    resolved = resolve(model)
    writes_from_source = has_encoder_and_decoder(resolved)
    kind: Literal["causal-lm", "seq2seq"] = "seq2seq" if writes_from_source else "causal-lm"
    tokenizer, loaded = load_tokenizer(resolved), load_model(resolved, task=kind, dtype=dtype)
    if adapter is not None:
        load(loaded, adapter)
        adopt_template(adapter, tokenizer)
    if writes_from_source:
        if system is not None:
            raise ConfigError("--system is for chat models; this one reads one text and writes one.")
        _say_answers(prompts, generate_from_sources(loaded, tokenizer, prompts, settings), as_json)
        return
    before = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*before, {"role": "user", "content": text}] for text in prompts]
    if len(prompts) == 1 and sys.stdout.isatty() and not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate(loaded, tokenizer, conversations, settings, streamer=streamer)
        return
    _say_answers(prompts, generate(loaded, tokenizer, conversations, settings), as_json)


def _say_answers(prompts: list[str], answers: list[str], as_json: bool) -> None:
    from lorakit.cli.output import say, say_json

    if as_json:
        say_json([{"prompt": text, "answer": answer} for text, answer in zip(prompts, answers, strict=True)])
    else:
        for answer in answers:
            say(answer)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    prompts = [text for text in [*given, *lines] if text.strip()]
    if not given and file is None and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        prompts = [text] if text else []
    return prompts
