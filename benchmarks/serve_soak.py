"""Does a server stay as it is under an hour's worth of everything, in ten minutes?

A real `lorakit serve` on a tiny base, so that steps are short, and clients that ask without a pause: chats, streams,
completions, mixes, forms, tools, LoRAX's calls; clients that go away; adapters loaded, replaced, aliased, pinned,
unloaded, damaged and mended; more adapters than fit into memory. Every answer is compared with what transformers says
for that adapter alone; memory, open files, threads and the KV arena are read all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import LORAKIT, Aim, Benchmark, start
from benchmarks.serving.soak_world import PROMPTS, TOKENS, World, make_world

ADAPTERS, CLIENTS, SECONDS = 48, 12, 600
LIVE = ("live0", "live1", "live2")
HERE = Path(__file__).resolve().parent.parent
# What may be answered to whom: a name that somebody has just unloaded, a store that is full of adapters in use.
_GONE, _FULL = (404, "model_not_found"), (503, "adapter_capacity")
_FORCED = (503, "request_aborted")


class Soak:
    """The clients, and what they have seen.

    Attributes:
        counts: What was done, and which errors were answered.
        problems: What must not happen.
    """

    def __init__(self, world: World, url: str, seconds: float, seed: int) -> None:
        self.world, self.url, self.seconds = world, url, seconds
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._draw = random.Random(seed)
        self._mixes: dict[tuple[str, int], str] = {}
        self._sources = [name for name in world.answers if name != "base"]
        self._client: httpx.AsyncClient

    async def run(self) -> None:
        """Ask until the time is over."""
        end = time.monotonic() + self.seconds
        limits = httpx.Limits(max_connections=4 * CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False, limits=limits) as client:
            self._client = client
            await asyncio.gather(*(self._one(end) for _ in range(CLIENTS)))

    async def _one(self, end: float) -> None:
        actions: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self._chat), (20, self._stream), (8, self._completion), (8, self._leave), (6, self._lorax),
            (6, self._mix), (5, self._form), (4, self._tools), (4, self._nonsense), (4, self._replace),
            (3, self._live), (1, self._unload), (1, self._pin), (1, self._alias), (2, self._damage), (3, self._look),
        ]  # fmt: skip
        weights, calls = zip(*actions, strict=True)
        while time.monotonic() < end and len(self.problems) < 20:
            (call,) = self._draw.choices(calls, weights)
            try:
                await call()
                self.counts[call.__name__.strip("_")] += 1
            except Exception as error:  # the soak goes on, and tells in the end
                self.problems.append(f"{call.__name__}: {type(error).__name__}: {str(error)[:300]}")

    # ---- asking
    def _body(self, model: str, text: str, **more: Any) -> dict[str, Any]:
        return {
            "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": TOKENS,
            **more,
        }  # fmt: skip

    async def _post(
        self, path: str, body: dict[str, Any], *allowed: tuple[int, str]
    ) -> dict[str, Any] | None:
        answer = await self._client.post(path, json=body)
        return self._checked(answer, path, *allowed)

    def _checked(self, answer: httpx.Response, what: str, *allowed: tuple[int, str]) -> dict[str, Any] | None:
        """The answer; None for an error that may be, and a problem for one that may not."""
        if answer.status_code < 400:
            found: dict[str, Any] = answer.json()
            return found
        error = answer.json()["error"]
        told = (answer.status_code, error["code"])
        self.counts[f"{told[0]} {told[1]}"] += 1
        if told not in allowed:
            self.problems.append(f"{what}: {told}: {error['message'][:300]}")
        return None

    def _compare(self, source: str, number: int, text: str) -> None:
        wanted = self.world.answers[source][number]
        if text != wanted:
            self.problems.append(f"{source} to prompt {number}: {text!r} instead of {wanted!r}")

    def _any(self) -> tuple[str, int]:
        """A source, some more often than others, and a prompt."""
        names = ["base", *self._sources]
        return names[int(self._draw.random() ** 2 * len(names))], self._draw.randrange(len(PROMPTS))

    async def _chat(self) -> None:
        source, number = self._any()
        more = self._draw.choice([{}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"seed": 3}])
        body = await self._post("/v1/chat/completions", self._body(source, PROMPTS[number], **more), _FULL)
        for choice in body["choices"] if body else ():
            self._compare(source, number, choice["message"]["content"])

    async def _stream(self) -> None:
        source, number = self._any()
        body = self._body(source, PROMPTS[number], stream=True, stream_options={"include_usage": True})
        text, lines = "", []
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._checked(answer, "stream", _FULL)
                return
            async for line in answer.aiter_lines():
                if line:
                    lines.append(line)
        if lines[-1] != "data: [DONE]":
            self.problems.append(f"a stream ended with {lines[-1][:200]}")
            return
        for line in lines[:-1]:
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
        self._compare(source, number, text)

    async def _leave(self) -> None:
        """Go away in the middle of a long answer, streamed or not."""
        source, number = self._any()
        body = self._body(source, PROMPTS[number], max_tokens=600, ignore_eos=True)
        if self._draw.random() < 0.5:
            async with self._client.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True}
            ) as answer:
                most = self._draw.randrange(1, 8)
                async for _ in answer.aiter_lines():
                    most -= 1
                    if not most:
                        return
        else:
            try:
                going = self._client.post("/v1/chat/completions", json=body)
                await asyncio.wait_for(going, self._draw.random() * 0.3)
            except asyncio.TimeoutError:  # not the built-in TimeoutError before Python 3.11
                pass

    async def _completion(self) -> None:
        source, _ = self._any()
        body = {
            "model": source, "prompt": ["one", "two and more"], "max_tokens": 4, "temperature": 0,
            "echo": self._draw.random() < 0.5, "logprobs": 1,
        }  # fmt: skip
        found = await self._post("/v1/completions", body, _FULL)
        if found and len(found["choices"]) != 2:
            self.problems.append("a completion of two prompts has not two choices")

    async def _lorax(self) -> None:
        source, number = self._any()
        parameters: dict[str, Any] = {"max_new_tokens": TOKENS, "apply_chat_template": True}
        if source != "base":
            parameters["adapter_id"] = source
        body = await self._post("/generate", {"inputs": PROMPTS[number], "parameters": parameters}, _FULL)
        if body:
            self._compare(source, number, body["generated_text"])

    async def _mix(self) -> None:
        a, b = self._draw.sample(self._sources[:8], 2)
        number = self._draw.randrange(len(PROMPTS))
        model = f"{a}:0.5+{b}:0.5"
        body = await self._post("/v1/chat/completions", self._body(model, PROMPTS[number]), _FULL)
        if body:
            text = body["choices"][0]["message"]["content"]
            if self._mixes.setdefault((model, number), text) != text:
                self.problems.append(f"{model} answered prompt {number} in two ways")

    async def _form(self) -> None:
        source, number = self._any()
        form = {"type": "regex", "regex": f"[0-9]{{{self._draw.randrange(1, 9)}}}"}
        body = self._body(source, PROMPTS[number], response_format=form)
        found = await self._post("/v1/chat/completions", body, _FULL)
        if found and not found["choices"][0]["message"]["content"].isdigit():
            self.problems.append("an answer does not have its form")

    async def _tools(self) -> None:
        source, number = self._any()
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                  "additionalProperties": False}  # fmt: skip
        body = self._body(
            source, PROMPTS[number], tool_choice="required", max_tokens=60,
            tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        )  # fmt: skip
        found = await self._post("/v1/chat/completions", body, _FULL)
        if found:
            (call,) = found["choices"][0]["message"]["tool_calls"]
            if json.loads(call["function"]["arguments"])["a"] not in (1, 2):
                self.problems.append("a call does not fit its schema")

    async def _nonsense(self) -> None:
        for body, wanted in (
            (self._body("nobody", "a"), _GONE),
            (self._body("../etc", "a"), (400, "invalid_adapter_id")),
            (self._body("base", "a", max_tokens=10**6), (400, "context_length_exceeded")),
            (self._body("base", "a", tempratur=1), (400, "invalid_request")),
        ):
            if await self._post("/v1/chat/completions", body, wanted) is not None:
                self.problems.append(f"nonsense was answered: {body}")

    # ---- operators
    async def _replace(self) -> None:
        body = {
            "name": self._draw.choice(LIVE),
            "source": self._draw.choice(self._sources),
            "if_exists": "replace",
        }
        await self._post("/v1/adapters", body, _FULL, _GONE)  # gone: unloaded before it could be shown

    async def _live(self) -> None:
        number = self._draw.randrange(len(PROMPTS))
        body = self._body(self._draw.choice(LIVE), PROMPTS[number])
        found = await self._post("/v1/chat/completions", body, _FULL, _GONE, _FORCED)
        if found:
            mine = found["system_fingerprint"].rpartition("_")[2]
            source = next(name for name, digest in self.world.digests.items() if digest == mine)
            self._compare(source, number, found["choices"][0]["message"]["content"])

    async def _unload(self) -> None:
        force = self._draw.random() < 0.3
        answer = await self._client.delete(
            f"/v1/adapters/{self._draw.choice(LIVE)}", params={"force": str(force).lower()}
        )
        self._checked(answer, "unload", _GONE)

    async def _pin(self) -> None:
        name = self._draw.choice(LIVE)
        await self._post(f"/v1/adapters/{name}/pin", {"pinned": self._draw.random() < 0.3}, _GONE)

    async def _alias(self) -> None:
        await self._post(f"/v1/adapters/{self._draw.choice(LIVE)}/alias", {"alias": "prod"}, _GONE)

    async def _damage(self) -> None:
        """A copy of an adapter is cut short, asked for, mended, asked for, and taken away."""
        name, source = f"hurt{self._draw.randrange(10**9)}", self._draw.choice(self._sources)
        folder = self.world.adapters / name
        shutil.copytree(self.world.adapters / source, folder)
        weights = folder / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: self._draw.randrange(len(whole))])
        body = self._body(name, PROMPTS[0])
        if await self._post("/v1/chat/completions", body, (424, "adapter_corrupt")) is not None:
            self.problems.append("a damaged adapter answered")
        weights.write_bytes(whole)
        found = await self._post("/v1/chat/completions", body, _FULL)
        if found:
            self._compare(source, 0, found["choices"][0]["message"]["content"])
        self._checked(await self._client.delete(f"/v1/adapters/{name}"), "unload")
        shutil.rmtree(folder)

    async def _look(self) -> None:
        for path in ("/v1/adapters", "/v1/models", "/metrics", "/health", "/v1/state", "/"):
            answer = await self._client.get(path)
            if answer.status_code != 200:
                self.problems.append(f"{path}: {answer.status_code}")


class Watch:
    """Reads what the process holds, every so often.

    Attributes:
        rows: Seconds, bytes in memory, open files, threads.
    """

    def __init__(self, process: int, every: float) -> None:
        self.rows: list[tuple[float, int, int, int]] = []
        self._process, self._every, self._over = process, every, threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            self.rows.append(self.look())

    def look(self) -> tuple[float, int, int, int]:
        """What it holds now."""
        status = Path(f"/proc/{self._process}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        files = len(os.listdir(f"/proc/{self._process}/fd"))
        resident = int(fields["VmRSS"].split()[0]) * 1024
        return time.monotonic() - self._began, resident, files, int(fields["Threads"])

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def serve(world: World, errors: Path) -> tuple[subprocess.Popen[str], str]:
    """`lorakit serve` in a process of its own, and its address; less room than the adapters need."""
    command = [
        sys.executable, "-m", "lorakit", "serve", str(world.base), "--adapters", str(world.adapters), "--port", "0",
        "--name", "base", "--threads", "1", "--adapter-memory", "1", "--prefix-cache", "1", "--kv-tokens", "4096",
        "--running", "8",
    ]  # fmt: skip
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=HERE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving"):
            return process, line.split()[1].removesuffix("/v1")
    raise SystemExit(f"the server did not start: {errors.read_text()[-2000:]}")


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=1)
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_soak", __doc__ or "", rest)
    seconds = 20.0 if bench.quick else ours.seconds
    with tempfile.TemporaryDirectory() as scratch:
        world = make_world(Path(scratch), ADAPTERS)
        errors = Path(scratch) / "errors.log"
        process, url = serve(world, errors)
        watch = Watch(process.pid, seconds / 200)
        try:
            soak = Soak(world, url, seconds, ours.seed)
            asyncio.run(soak.run())
            state = _quiet(url)
            left = watch.look()
        finally:
            watch.close()
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        log = errors.read_text()
    if code:
        soak.problems.append(f"the server ended with {code}: {log[-500:]}")
    if "Traceback" in log:
        at = log.index("Traceback")
        soak.problems.append(f"a traceback in the log: {log[max(0, at - 500) : at + 4000]}")
    report(bench, soak, watch, state, left)
    bench.finish()
    return bench


def _quiet(url: str) -> dict[str, Any]:
    """The server's state when nothing is in hand any more."""
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        for name in (*LIVE, "prod"):
            client.delete(f"/v1/adapters/{name}")
        for _ in range(100):
            state: dict[str, Any] = client.get("/v1/state").json()
            busy = state["engine"]["running"] or state["engine"]["waiting"] or state["adapters"]["in_use"]
            if not busy and not state["adapters"]["loading"]:
                break
            time.sleep(0.1)
    return state


def report(
    bench: Benchmark, soak: Soak, watch: Watch, state: dict[str, Any], left: tuple[float, int, int, int]
) -> None:
    """What grew, what was left, and what went wrong."""
    for problem in soak.problems:
        print(f"PROBLEM  {problem}", flush=True)
    half = watch.rows[len(watch.rows) // 2 :]
    times = [row[0] for row in half]
    done = sum(n for name, n in soak.counts.items() if not name[0].isdigit())
    told = ", ".join(f"{name} {n}" for name, n in sorted(soak.counts.items()))
    bench.add("things done", {LORAKIT: [float(done)]}, unit="", ratio=None, note=told)
    bench.add("problems", {LORAKIT: [float(len(soak.problems))]}, unit="", ratio=None, aim=Aim(LORAKIT, "<=", 0),
              note="; ".join(soak.problems)[:2000])  # fmt: skip
    for column, name, unit, scale, most in (
        (1, "memory", "MB", 1e-6, 10.0),
        (2, "open files", "files", 1.0, 2.0),
        (3, "threads", "threads", 1.0, 1.0),
    ):
        values = [row[column] * scale for row in half]
        slope = statistics.linear_regression(times, values).slope
        grown = slope * (times[-1] - times[0])
        bench.add(f"{name}, second half", {LORAKIT: values}, unit=unit, ratio=None)
        bench.add(f"{name}, growth in the second half", {LORAKIT: [grown]}, unit=unit, ratio=None,
                  aim=Aim(LORAKIT, "<=", most))  # fmt: skip
    engine, adapters = state["engine"], state["adapters"]
    over = {
        "running": engine["running"], "waiting": engine["waiting"], "tokens of KV": engine["kv_tokens"],
        "leases": adapters["in_use"], "draining": adapters["draining"],
    }  # fmt: skip
    bench.add("left in hand at the end", {LORAKIT: [float(sum(over.values()))]}, unit="", ratio=None,
              aim=Aim(LORAKIT, "<=", 0), note=f"{over}; evictions {adapters['evictions']}, loads {adapters['loads']}; "
              f"{left[2]} files, {left[3]} threads")  # fmt: skip


if __name__ == "__main__":
    main()
