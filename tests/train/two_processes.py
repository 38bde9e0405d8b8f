"""A program that trains in pairs of processes, as a launcher starts them; the tests read what they leave.

Given a JSON file with a list of jobs, it imports everything once and then forks two processes for each job. A process
that dies takes the other one along, as launchers do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

IMPORTED = (
    "accelerate",
    "matplotlib.figure",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "lorakit.models.load",
    "lorakit.train.loop",
    "lorakit.train.reporting",
    "lorakit.train.trackers",
    "lorakit.train.tasks.causal_lm",
    "lorakit.train.tasks.preference",
    "lorakit.train.tasks.several",
)


def work(job: dict[str, Any], rank: int, record: Path) -> None:
    """Train as one of two processes and leave a record."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from lorakit.errors import LorakitError
    from lorakit.train import Recipe, Silent, StepReport, train

    output = job["recipe"]["output"]
    written: list[str] = []

    def hook(event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[1], str) and given[1][0] in "wxa"
        if (writes or event in ("os.rename", "os.remove", "os.rmdir")) and str(given[0]).startswith(output):
            written.append(str(given[0])[len(output) + 1 :])

    sys.addaudithook(hook)

    class Watch(Silent):
        steps: list[int]
        lines: list[str]

        def __init__(self) -> None:
            self.steps, self.lines = [], []

        def say(self, line: str) -> None:
            self.lines.append(line)

        def step(self, report: StepReport) -> None:
            self.steps.append(report.step)
            if job.get("stop") == report.step:
                os.kill(os.getpid(), signal.SIGINT)

    if rank == job.get("killed_rank"):
        from lorakit.train.loop import AdapterTrainer

        whole = AdapterTrainer.training_step

        def training_step(self: Any, *given: Any, **named: Any) -> Any:
            if self.state.global_step == job["killed_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, *given, **named)

        AdapterTrainer.training_step = training_step  # type: ignore[method-assign]

    watch = Watch()
    found: dict[str, Any] = {}
    try:
        result = train(Recipe.from_mapping(job["recipe"]), resume=job.get("resume", False), progress=watch)
        if isinstance(result.model, FSDPModule):
            result.model.reshard()  # the last forward pass leaves what is not in a layer whole
        parts = [p for p in result.model.parameters() if isinstance(p, DTensor)]
        found = {
            "losses": list(result.losses),
            "losses_of": {name: list(values) for name, values in result.losses_of.items()},
            "tokens": [result.tokens, result.learnt_tokens],
            "valid_loss": result.valid_loss,
            "stopped_by": result.stopped_by,
            "base_parts": sum(p.to_local().numel() for p in parts),
            "base_whole": sum(p.numel() for p in parts),
            "trained_parts": sum(p.requires_grad for p in parts),
        }
    except LorakitError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except BaseException:
        found = {"error": "unexpected", "message": traceback.format_exc()}
    found |= {"written": sorted(set(written)), "steps": watch.steps, "lines": watch.lines}
    record.write_text(json.dumps(found), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def pair(job: dict[str, Any], folder: Path) -> list[int]:
    """Run a job; returns how its processes ended."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **job.get("environment", {}),
            }
            try:
                work(job, rank, folder / f"{job['name']}.{rank}.json")
            finally:
                os._exit(0)
        children.append(child)
    ended = {}
    while len(ended) < 2:
        child, status = os.wait()
        ended[child] = status
        if os.WIFSIGNALED(status):
            for other in children:
                if other not in ended:
                    os.kill(other, signal.SIGKILL)
    return [os.WTERMSIG(ended[child]) for child in children]


def main(jobs: Path) -> None:
    """Run all jobs, in their order."""
    for name in IMPORTED:  # before the processes part
        if find_spec(name.partition(".")[0]):
            import_module(name)
    ended = {job["name"]: pair(job, jobs.parent) for job in json.loads(jobs.read_text(encoding="utf-8"))}
    (jobs.parent / "ended.json").write_text(json.dumps(ended), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
