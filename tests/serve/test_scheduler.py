"""Steps: what grows goes first, prompts share the rest, adapters take turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.serve.answer import Answer, Job
from lorakit.serve.batch import Work, pack
from lorakit.serve.scheduler import EngineLimits, Scheduler
from tests.serve.test_fairness import job


def placed(one: Job) -> bool:
    """Answers without a slab: nothing is computed here."""
    slab: Any = SimpleNamespace(free=lambda: None)
    tokenizer: Any = SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens)))
    one.answers = [Answer(one, i, slab, tokenizer, ()) for i in range(one.request.n)]
    for other in one.answers[1:]:
        other.leader = one.answers[0]
    return True


def scheduler(*jobs: Job, **limits: Any) -> Scheduler:
    made = Scheduler(EngineLimits(**{"running": 8, "step_tokens": 16, **limits}))
    for one in jobs:
        made.queue.add(one)
    made.admit(0.0, placed)
    return made


def advance(work: list[Work]) -> None:
    for item in work:
        complete = item.complete
        item.answer.read += item.count
        if complete:
            item.answer.tokens.append(7)
            for other in item.answer.job.answers:
                if other.leader is item.answer:
                    other.leader, other.read = None, item.answer.read
                    other.tokens.append(7)


def counts(work: list[Work]) -> list[int]:
    return [item.count for item in work]


def test_a_prompt_is_read_in_pieces_of_the_budget() -> None:
    made = scheduler(job(prompt=40))
    seen = []
    for _ in range(4):
        work = made.plan()
        seen += counts(work)
        advance(work)
    assert seen == [16, 16, 8, 1]


def test_growing_answers_go_before_prompts() -> None:
    made = scheduler(job(prompt=3), job(prompt=3))
    advance(made.plan())
    made.queue.add(job(prompt=100))
    made.admit(0.0, placed)
    assert counts(made.plan()) == [1, 1, 14]


def test_prompts_of_tenants_are_read_in_turns() -> None:
    made = scheduler(job("a", prompt=64), job("b", prompt=64))
    tenants = []
    for _ in range(4):
        work = made.plan()
        tenants += [item.answer.job.request.tenant for item in work]
        advance(work)
    assert sorted(tenants) == ["a", "a", "b", "b"]
    assert tenants[0] != tenants[1]


def test_further_answers_wait_for_the_one_that_reads_their_prompt() -> None:
    made = scheduler(job(prompt=20, n=3))
    work = made.plan()
    assert counts(work) == [16]
    advance(work)
    work = made.plan()
    assert counts(work) == [4]
    advance(work)
    assert counts(made.plan()) == [1, 1, 1]


def test_no_more_run_than_may() -> None:
    made = scheduler(*(job(n=3) for _ in range(4)))
    assert len(made.running) == 6
    assert len(made.queue) == 2


def test_adapters_take_turns_and_the_base_has_no_part_in_that() -> None:
    jobs = [job(digest=digest, prompt=2) for digest in "abcd"]
    made = scheduler(*jobs, job(prompt=2), adapters_per_step=2, step_tokens=32)
    turns = []
    for _ in range(6):
        work = made.plan()
        digests = [item.answer.digest for item in work]
        assert None in digests
        assert len({d for d in digests if d}) == 2
        turns += [d for d in digests if d]
        advance(work)
    assert {turns.count(digest) for digest in "abcd"} == {3}


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"running": 0}, "running"),
        ({"step_tokens": 1}, "step_tokens"),
        ({"running": 16, "step_tokens": 16}, "no prompt could be read"),
        ({"adapters_per_step": 0}, "adapters_per_step"),
        ({"aging": 0}, "aging"),
        ({"waiting": -1}, "waiting"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineLimits(**limits)


def test_a_step_is_one_row_with_each_adapter_in_one_place() -> None:
    jobs = [job(digest=d, prompt=n) for d, n in (("b", 3), (None, 2), ("a", 4), ("b", 1), (None, 5))]
    made = scheduler(*jobs, step_tokens=32)
    for one in jobs:
        one.answers[0].tokens = [jobs.index(one) * 10 + i for i in range(len(one.request.prompt))]
        one.answers[0].read = 0
    jobs[0].answers[0].read = 1
    packed = pack([Work(one.answers[0], one.answers[0].unread) for one in jobs])
    batch = packed.batch
    names = [None if s.version is None else s.version.digest for s in batch.segments]
    assert names == [None, "a", "b"]
    assert [(s.start, s.end) for s in batch.segments] == [(0, 7), (7, 11), (11, 14)]
    assert batch.tokens.tolist() == [10, 11, 40, 41, 42, 43, 44, 20, 21, 22, 23, 1, 2, 30]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 1, 2, 0]
    assert [(p.start, p.end, p.past) for p in batch.pieces] == [
        (0, 2, 0),
        (2, 7, 0),
        (7, 11, 0),
        (11, 13, 1),
        (13, 14, 0),
    ]
    assert batch.last.tolist() == [1, 6, 10, 12, 13]
    assert made.plan()


def test_unfinished_prompts_want_no_logits_and_scored_ones_want_all() -> None:
    plain, scored = job(prompt=5), job(prompt=4, prompt_logprobs=1)
    scheduler(plain, scored, step_tokens=32)
    packed = pack([Work(plain.answers[0], 3), Work(scored.answers[0], 2)])
    assert packed.batch.last.tolist() == [3, 4]
    assert packed.rows == [slice(0, 0), slice(0, 2)]
