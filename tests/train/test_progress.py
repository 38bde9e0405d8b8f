"""What a run tells."""

from __future__ import annotations

import io

import pytest

from lorakit.train.progress import PlainProgress, RichProgress, StepReport, clock, progress_for


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (-1, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_plain_lines_come_rarely_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_seconds=10)
    for step in range(1, 31):
        progress.step(StepReport(step, 30, 1.5, 123.4, float(step), 30.0 - step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/30", "11/30", "21/30", "30/30"]
    assert lines[1] == "step 11/30  loss 1.5000  123 tokens/s  0:11 gone, 0:19 left"


def test_images_are_not_called_tokens() -> None:
    stream = io.StringIO()
    PlainProgress(stream).step(StepReport(30, 30, 1.5, 12.3, 30.0, 0.0, reads="image"))
    assert "  12 images/s  " in stream.getvalue()


def test_plain_answers() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_seconds=100)
    for done in (16, 32, 40):
        progress.answered(done, 40, "answering")
    assert stream.getvalue().splitlines()[-1] == "answering: 40/40"


def test_a_pipe_gets_lines() -> None:
    assert isinstance(progress_for(io.StringIO()), PlainProgress)


def test_bar_takes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    progress.say("[not markup]")
    progress.step(StepReport(1, 2, 0.5, 100.0, 1.0, 1.0))
    progress.step(StepReport(2, 2, 0.25, 100.0, 2.0, 0.0))
    progress.answered(3, 4, "answering")
    progress.close()
    shown = capsys.readouterr().err
    assert "[not markup]" in shown
    assert "2/2" in shown
    assert "loss 0.250" in shown
