"""`kill -9` of a server under load, and of what saves an adapter into its folder: no half of anything is left."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from lorakit.serve.manifest import MANIFEST, TrustedKeys, make_key, read_manifest, sign, verify_files
from tests.serve.http_world import BASE, chat, save_adapter, save_world, until
from tests.serve.program import Program

pytest.importorskip("cryptography")

SIGNED = ("sql", "style")
TEXTS = ("hello", "What is 1 + 1?")
# Saves two adapters into one folder in turn, again and again.
WRITER = """
import sys, lorakit as lk
states = [lk.read(path) for path in sys.argv[2:]]
print("begun", flush=True)
while True:
    for state in states:
        lk.save(state, sys.argv[1])
"""


class Life:
    """A server under load, from its start to its sudden end."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.program = Program(folder, "--adapters", folder / "adapters", *words)
        self.log: list[str] = []
        self.answers: list[tuple[str, str, str]] = []
        self.strange: list[str] = []
        self._over = threading.Event()
        work = [threading.Thread(target=self._drain)]
        work += [threading.Thread(target=self._ask, args=(i,)) for i in range(3)]
        work += [threading.Thread(target=self._operate)]
        self._threads = work
        for thread in work:
            thread.start()

    def _drain(self) -> None:
        assert self.program.process.stderr is not None
        with self.program.process.stderr as lines:
            self.log += lines

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.program.url, timeout=30, trust_env=False)

    def _ask(self, number: int) -> None:
        draw = random.Random(number)
        with self._client() as client:
            while not self._over.is_set():
                model, text = draw.choice([*SIGNED, "written", BASE]), draw.choice(TEXTS)
                try:
                    answer = client.post("/v1/chat/completions", json=chat(model, text))
                except httpx.TransportError:
                    continue  # the end, or it comes
                if answer.status_code == 200:
                    self.answers.append((model, text, answer.json()["choices"][0]["message"]["content"]))
                elif model != "written":  # which is not there until it has been saved once
                    self.strange.append(answer.text)

    def _operate(self) -> None:
        draw = random.Random(99)
        with self._client() as client:
            while not self._over.is_set():
                body = {"name": "live", "source": draw.choice(SIGNED), "if_exists": "replace"}
                try:
                    answer = client.post("/v1/adapters", json=body)
                except httpx.TransportError:
                    continue
                if answer.status_code != 201:
                    self.strange.append(answer.text)

    def kill(self) -> None:
        """End it at once."""
        self.program.process.kill()
        self.program.process.wait(20)
        assert self.program.process.stdout is not None
        self.program.process.stdout.close()
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_world(tmp_path)
    make_key(tmp_path / "key.pem")
    for name in SIGNED:
        sign(tmp_path / "adapters" / name, tmp_path / "key.pem")
    save_adapter(tmp_path / "one", seed=21)
    save_adapter(tmp_path / "two", seed=22)
    key = read_manifest(tmp_path / "adapters" / "sql" / MANIFEST).key
    (tmp_path / "trusted.txt").write_text(f"{key} me\n")
    return tmp_path


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kill_again_and_again(folder: Path, times: int) -> None:
    draw = random.Random(5)
    before = {name: files_of(folder / "adapters" / name) for name in SIGNED}
    truth: dict[tuple[str, str], set[str]] = {}
    for life_number in range(times):
        writer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WRITER,
                *map(str, (folder / "adapters" / "written", folder / "one", folder / "two")),
            ],
            stdout=subprocess.PIPE,
        )
        life = Life(folder)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        until(lambda: len(life.answers) > 5, 60)  # noqa: B023 (called at once)
        time.sleep(draw.uniform(0.0, 0.8))
        writer.kill()
        life.kill()
        writer.wait(20)
        writer.stdout.close()
        assert not life.strange
        assert not [line for line in life.log if "Traceback" in line]
        for model, text, answer in life.answers:
            truth.setdefault((model, text), set()).add(answer)
        assert {name: files_of(folder / "adapters" / name) for name in SIGNED} == before, life_number
    for (model, _), answers in truth.items():
        assert len(answers) <= (2 if model == "written" else 1), (model, answers)

    trusted = TrustedKeys.read(folder / "trusted.txt")
    for name in SIGNED:
        verify_files(folder / "adapters" / name, trusted)
    after = Program(folder, "--adapters", folder / "adapters")
    with httpx.Client(base_url=after.url, timeout=30, trust_env=False) as client:
        listed = {entry["id"] for entry in client.get("/v1/adapters").json()["data"]}
        assert listed == {
            *SIGNED,
            "acme-secret",
            "written",
        }  # no part of a file is an adapter; `live` was a name only
        for name in listed:
            for text in TEXTS:
                answer = client.post("/v1/chat/completions", json=chat(name, text))
                assert answer.status_code == 200, answer.text
                said = answer.json()["choices"][0]["message"]["content"]
                known = truth.get((name, text), {said})
                assert said in known or (name == "written" and len(known) < 2)
    after.process.terminate()
    assert after.end()[0] == 0


@pytest.mark.slow  # three starts of whole programs
def test_a_sudden_end(folder: Path) -> None:
    kill_again_and_again(folder, 1)


@pytest.mark.slow
def test_many_sudden_ends_and_then_only_what_is_signed(folder: Path) -> None:
    kill_again_and_again(folder, 6)
    strict = Program(folder, "--adapters", folder / "adapters", "--trusted", folder / "trusted.txt")
    with httpx.Client(base_url=strict.url, timeout=30, trust_env=False) as client:
        codes = {
            name: client.post("/v1/chat/completions", json=chat(name)).status_code
            for name in (*SIGNED, "written", "acme-secret")
        }
    strict.process.terminate()
    assert strict.end()[0] == 0
    assert codes == {"sql": 200, "style": 200, "written": 403, "acme-secret": 403}
