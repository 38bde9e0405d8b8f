"""``lorakit chat``, through a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import colour_rows

QUESTIONS = [row["prompt"] for row in colour_rows(3)]


@pytest.fixture
def talk(lorakit: Lorakit, trained: Trained, monkeypatch: pytest.MonkeyPatch):
    def call(*lines: str, words: tuple[object, ...] = ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return lorakit("chat", trained.model, "-n", 8, *words)

    return call


def test_answers_as_trained(talk, trained: Trained) -> None:
    lines = [line for question in QUESTIONS for line in (question, "/reset")]
    outcome = talk(*lines, words=("--adapter", trained.adapter))
    assert outcome.code == 0
    assert outcome.out.split() == ["red", "green", "blue"]
    assert outcome.err == ""


def test_switching(talk, trained: Trained) -> None:
    base = talk(QUESTIONS[0]).out
    outcome = talk(
        QUESTIONS[0], "/reset", "/switch model", QUESTIONS[0], "/reset", "/switch run", QUESTIONS[0],
        words=("-a", trained.adapter),
    )  # fmt: skip
    assert outcome.out == f"red\n{base}red\n"


def test_the_conversation_is_remembered_until_reset(talk) -> None:
    one, again = talk("a", "b").out, talk("a", "/reset", "b").out
    alone = talk("b").out
    assert again.endswith(alone)
    assert not one.endswith(alone)


def test_commands(talk, trained: Trained) -> None:
    outcome = talk(
        "/help", "/adapters", "/swich run", "/switch nope", "", "/quit", "a", words=("-a", trained.adapter)
    )
    assert outcome.out == ""
    assert "/reset" in outcome.err
    assert "model\nrun\n" in outcome.err
    assert "Did you mean '/switch NAME'" in outcome.err
    assert "'nope'" in outcome.err


def test_a_conversation_that_is_too_long(talk) -> None:
    outcome = talk("x" * 2000, "a")
    assert outcome.code == 0
    assert "/reset begins anew" in outcome.err
    assert outcome.out == talk("a").out


def test_adapters_of_the_same_name(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("chat", trained.model, "-a", trained.adapter, "-a", trained.adapter)
    assert outcome.code == 2
    assert "'run'" in outcome.err


def test_what_does_not_converse_is_told_so(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    from tests.tiny_encoder import save_tiny_encoder
    from tests.tiny_writers import save_tiny_t5

    told = lorakit("chat", save_tiny_t5(tmp_path / "t5"))
    assert (told.code, told.out) == (2, "")
    assert "Ask it with lorakit generate" in told.err
    told = lorakit("chat", save_tiny_encoder(tmp_path / "bert"))
    assert "BertModel, which writes nothing" in told.err
    told = lorakit("chat", trained.model, "-a", trained.adapter.parent.parent / "none")
    assert told.code == 2


def test_a_runs_folder_is_its_adapter(talk, trained: Trained) -> None:
    assert talk(QUESTIONS[0], words=("--adapter", trained.adapter.parent)).out == "red\n"
