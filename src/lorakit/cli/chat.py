"""``lorakit chat``: talk to a model, and change adapters in the middle of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorakit.models.conversation import Message
    from lorakit.serve.multi_task import MultiTaskLoRAServer
    from lorakit.serve.sampling import Sampling

_HELP = """/switch NAME   answer with this adapter from now on; the base has its own name
/adapters      what there is to switch to
/reset         forget the conversation
/help          this list
/quit          leave; so does Ctrl-D"""


def command(
    base: Annotated[str, typer.Argument(help="A folder, a built-in name (smollm2), or a hub id (org/name).")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter", "-a", help="Folder of an adapter; the first one answers. As often as needed."
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message of the conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", "-t", min=0, help="0 takes the likeliest token; above, tokens are drawn."
        ),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this share.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes the drawing repeatable.")] = None,
    weights: Annotated[str, typer.Option("--weights", "-w", help="fp32 or int8.")] = "fp32",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute with.")] = None,
) -> None:
    r"""Talk to a model; answers appear as they are written.

    A line that begins with / is a command: /switch NAME, /adapters, /reset, /help, /quit. From a pipe, each line is one
    turn, and only the answers are printed.

    [bold]Examples[/bold]

        lorakit chat smollm2
        lorakit chat smollm2 -a runs/sql/adapter -a runs/style/adapter
        printf 'Hello!\n/reset\nWho are you?\n' | lorakit chat smollm2
    """
    from typing import cast

    from lorakit.cli.output import quiet_loading
    from lorakit.serve.multi_task import MultiTaskLoRAServer
    from lorakit.serve.native_model import Storage
    from lorakit.serve.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    quiet_loading()
    _check_converses(base)
    with MultiTaskLoRAServer(base, weights=cast(Storage, weights), threads=threads) as server:
        names = [_load(server, folder) for folder in adapter or []]
        server.switch_task(names[0] if names else None)
        _Conversation(server, names, system, sampling, max_tokens).run()


def _check_converses(base: str) -> None:
    """Raise `ConfigError` for a model on this disk that reads with an encoder: it is asked by other commands."""
    from lorakit.errors import ConfigError
    from lorakit.models import has_encoder_and_decoder, resolve
    from lorakit.models.purpose import kind_of_class

    found = resolve(base)
    if found.path is None:
        return
    if has_encoder_and_decoder(found):
        raise ConfigError(
            f"{base} reads one text with an encoder and writes one: it does not converse. Ask it with lorakit generate."
        )
    kind = kind_of_class(found.architectures)
    if kind not in (None, "causal-lm"):
        raise ConfigError(
            f"{base} is a {found.architectures[0]}, which writes nothing: it does not converse."
        )


def _load(server: MultiTaskLoRAServer, folder: Path) -> str:
    """Load an adapter under its folder's name, or that of the run around it; returns the name."""
    from lorakit.errors import ConfigError
    from lorakit.serve.versions import parse_name
    from lorakit.train.run_adapter import adapter_for

    folder = adapter_for(folder, "does not converse", "causal-lm")
    whole = folder.resolve()
    name = parse_name(whole.parent.name if whole.name == "adapter" else whole.name)
    if name in {entry.name for entry in server.server.store.list()}:
        raise ConfigError(f"Two adapters would be called {name!r}; rename the folder {folder}.")
    server.load_task(name, folder)
    return name


class _Conversation:
    """One conversation on the terminal, or through a pipe."""

    def __init__(
        self,
        server: MultiTaskLoRAServer,
        names: list[str],
        system: str | None,
        sampling: Sampling,
        max_tokens: int,
    ) -> None:
        import sys

        self._server, self._names, self._system = server, names, system
        self._sampling, self._max_tokens = sampling, max_tokens
        self._talking = sys.stdin.isatty()
        self._turns: list[Message] = []
        self._reset()

    def run(self) -> None:
        """Until the end of the input."""
        if self._talking:
            self._tell(f"{self._server.server.name} is ready. /help lists what else can be written.")
        while (line := self._read()) is not None:
            if not line:
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._obey(line)
            else:
                self._answer(line)

    def _read(self) -> str | None:
        import sys

        if not self._talking:
            line = sys.stdin.readline()
            return line.strip() if line else None
        try:
            return input(f"{self._server.task or self._server.server.name}> ").strip()
        except EOFError:
            self._tell("")
            return None

    def _obey(self, line: str) -> None:
        from lorakit.errors import near_matches

        word, _, rest = line.partition(" ")
        if word == "/reset":
            self._reset()
        elif word == "/switch" and rest:
            self._switch(rest.strip())
        elif word == "/adapters":
            self._tell("\n".join([self._server.server.name, *self._names]))
        elif word == "/help":
            self._tell(_HELP)
        else:
            known = ["/switch NAME", "/adapters", "/reset", "/help", "/quit"]
            self._tell(f"{line!r} is no command.{near_matches(word, known)} /help lists them.")

    def _switch(self, name: str) -> None:
        from lorakit.errors import ServeError

        try:
            self._server.switch_task(None if name == self._server.server.name else name)
        except ServeError as error:
            self._tell(f"{error} /adapters lists what there is.")

    def _answer(self, text: str) -> None:
        import sys

        from lorakit.cli.output import say
        from lorakit.errors import ServeError

        self._turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._server.stream(
                self._turns, sampling=self._sampling, max_tokens=self._max_tokens
            ):
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:  # enough of this answer, not of the conversation
            if not self._talking:
                raise
        except ServeError as error:
            self._turns.pop()
            self._tell(f"{error} /reset begins anew.")
            return
        say()
        self._turns.append({"role": "assistant", "content": "".join(pieces)})

    def _reset(self) -> None:
        self._turns = [] if self._system is None else [{"role": "system", "content": self._system}]

    @staticmethod
    def _tell(text: str) -> None:
        """What is no answer goes to standard error."""
        import sys

        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
