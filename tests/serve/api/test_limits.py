"""What is let in, with a clock that the test turns."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from lorakit.errors import ConfigError, OverloadedError, RateLimitError, RequestTooLargeError
from lorakit.serve.api.auth import Tenant
from lorakit.serve.api.limits import Admission, Limits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


A, B = Tenant("a"), Tenant("b")


def enter(admission: Admission, tenant: Tenant) -> None:
    with admission.request(tenant):
        pass


def test_requests_per_minute_fill_up_again() -> None:
    clock = Clock()
    admission = Admission(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        enter(admission, A)
    with pytest.raises(RateLimitError) as refused:
        enter(admission, A)
    assert refused.value.retry_after == 20
    enter(admission, B)  # each tenant has its own
    clock.now += 19.9
    with pytest.raises(RateLimitError):
        enter(admission, A)
    clock.now += 0.2
    enter(admission, A)
    clock.now += 3600  # what is not used does not pile up
    for _ in range(3):
        enter(admission, A)
    with pytest.raises(RateLimitError):
        enter(admission, A)


def test_a_tenants_own_limits_come_first() -> None:
    admission = Admission(Limits(requests_per_minute=100, tenant_in_flight=9), Clock())
    small = Tenant("small", requests_per_minute=1, in_flight=1)
    with admission.request(small), pytest.raises(RateLimitError, match="in hand"):
        enter(admission, small)
    with pytest.raises(RateLimitError, match="per minute"):
        enter(admission, small)


def test_in_flight_of_one_and_of_all() -> None:
    admission = Admission(Limits(in_flight=3, tenant_in_flight=2), Clock())
    with ExitStack() as held:
        held.enter_context(admission.request(A))
        held.enter_context(admission.request(A))
        with pytest.raises(RateLimitError):
            enter(admission, A)
        held.enter_context(admission.request(B))
        with pytest.raises(OverloadedError):
            enter(admission, B)
        assert admission.in_flight == 3
    assert admission.in_flight == 0
    enter(admission, A)


def test_a_request_that_fails_leaves_too() -> None:
    admission = Admission(Limits(in_flight=1), Clock())
    with pytest.raises(KeyError), admission.request(A):
        raise KeyError
    enter(admission, A)


def test_bytes_of_one_body_and_of_all() -> None:
    admission = Admission(Limits(body_bytes=10, held_bytes=15), Clock())
    with admission.body() as hold:
        hold(6)
        hold(4)
        with pytest.raises(RequestTooLargeError):
            hold(1)
        with admission.body() as other:
            other(5)
            with pytest.raises(OverloadedError):
                other(1)
        assert admission.held_bytes == 10
    assert admission.held_bytes == 0


@pytest.mark.parametrize("wrong", [{"in_flight": 0}, {"body_bytes": -1}, {"requests_per_minute": 0}])
def test_limits_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
