"""Which adapters act: blocks that nest, one route for each thread and task, and nothing left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterNameError, NotAttachedError, RoutingError
from tests.attach.small_models import Mlp, TiedLm, fill, picture, with_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, x: Tensor = X) -> dict[Any, Tensor]:
    """The output of each adapter, and under None of the base."""
    found = {}
    for name in (None, *(a.name for a in lk.report(model).adapters)):
        with torch.no_grad(), lk.use(model, name):
            found[name] = model(x)
    return found


@pytest.fixture
def model() -> nn.Module:
    return with_adapters(Mlp(), "a", "b").eval()


def test_the_adapters_differ_or_the_tests_below_say_nothing(model: nn.Module) -> None:
    got = outputs(model)
    for one, two in ((None, "a"), (None, "b"), ("a", "b")):
        assert (got[one] - got[two]).abs().max() > 0.1


# ---- set_active ---------------------------------------------------------------------------------------------------
def test_the_first_adapter_acts_and_set_active_changes_that(model: nn.Module) -> None:
    want = outputs(model)
    assert torch.equal(model(X), want["a"])
    for name in ("b", None, "a"):
        lk.set_active(model, name)
        assert torch.equal(model(X), want[name])
    assert lk.report(model).active == {"a": 1.0}


def test_weights_add_the_changes_of_one_layer_up() -> None:
    layer = with_adapters(nn.Sequential(nn.Linear(6, 4)), "a", "b")
    want = outputs(layer)
    lk.set_active(layer, {"a": 0.7, "b": -0.3})
    mixed = want[None] + 0.7 * (want["a"] - want[None]) - 0.3 * (want["b"] - want[None])
    torch.testing.assert_close(layer(X), mixed)
    lk.set_active(layer, ["b", "a"])
    torch.testing.assert_close(layer(X), want["a"] + want["b"] - want[None])
    lk.set_active(layer, {"a": 0.0})
    torch.testing.assert_close(layer(X), want[None])


def test_set_active_and_use_touch_neither_flags_nor_modes(model: nn.Module) -> None:
    lk.attach(model, lk.extract(model, "a"), name="frozen")
    model.fc1.train()

    def flags() -> Any:
        return [(n, p.requires_grad) for n, p in model.named_parameters()], [
            m.training for m in model.modules()
        ]

    before = flags()
    for route in ("frozen", None, {"a": 0.5, "frozen": 2}, ["a", "b"], "a"):
        lk.set_active(model, route)
        assert flags() == before
        with lk.use(model, route):
            assert flags() == before
        assert flags() == before


BAD_ROUTES: list[tuple[Any, type[Exception], str]] = [
    ("c", AdapterNameError, "No adapter is called 'c'"),
    ("A", AdapterNameError, "Did you mean 'a'"),
    (["a", "c"], AdapterNameError, "'c'"),
    ({"a": 1, "c": 0}, AdapterNameError, "'c'"),
    (["a", "a"], RoutingError, "named twice"),
    (["a", None], RoutingError, r"rows=\["),
    (3, RoutingError, "got 3"),
    ({"a": "strong"}, RoutingError, "strong"),
    ({"a": float("nan")}, RoutingError, "finite"),
    ({None: 1.0}, RoutingError, "None"),
]


@pytest.mark.parametrize(("route", "error", "message"), BAD_ROUTES)
def test_a_bad_route_is_refused_and_changes_nothing(
    model: nn.Module, route: Any, error: type[Exception], message: str
) -> None:
    before = picture(model)
    with pytest.raises(error, match=message):
        lk.set_active(model, route)
    with pytest.raises(error, match=message), lk.use(model, route):
        pass
    assert picture(model) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("ab", "string"),
        (2, "got 2"),
        (["a", 1.5], "1.5"),
        (["a", ["b", "b"]], "twice"),
        (["a", "c"], "'c'"),
    ],
)
def test_bad_rows_are_refused(model: nn.Module, rows: Any, message: str) -> None:
    with pytest.raises((RoutingError, AdapterNameError), match=message), lk.use(model, rows=rows):
        pass
    with pytest.raises(RoutingError, match="not both"), lk.use(model, "a", rows=["a"]):
        pass


# ---- use ----------------------------------------------------------------------------------------------------------
def test_blocks_nest_and_the_inner_one_decides(model: nn.Module) -> None:
    want = outputs(model)
    with lk.use(model, "b"):
        assert torch.equal(model(X), want["b"])
        with lk.use(model, None):
            assert torch.equal(model(X), want[None])
            with lk.use(model, "a"):
                assert torch.equal(model(X), want["a"])
            lk.set_active(model, "b")  # for everywhere else: the block still decides here
            assert torch.equal(model(X), want[None])
        assert torch.equal(model(X), want["b"])
    assert torch.equal(model(X), want["b"])


def test_two_models_have_routes_of_their_own(model: nn.Module) -> None:
    other = with_adapters(Mlp(), "a", "b").eval()
    mine, theirs = outputs(model), outputs(other)
    with lk.use(model, "b"), lk.use(other, None):
        assert torch.equal(model(X), mine["b"])
        assert torch.equal(other(X), theirs[None])
    with lk.use(other, "b"):
        assert torch.equal(model(X), mine["a"])


def test_a_block_of_the_wrong_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(NotAttachedError, match="Mlp carries no adapters"), lk.use(Mlp(), "a"):
        pass
    with pytest.raises(NotAttachedError, match="contains this one"), lk.use(model.fc1, "a"):
        pass
    two = nn.ModuleList([with_adapters(Mlp(), "a"), with_adapters(Mlp(), "a")])
    with pytest.raises(NotAttachedError, match="0, 1"), lk.use(two, "a"):
        pass


def test_a_block_can_be_entered_once(model: nn.Module) -> None:
    block = lk.use(model, "b")
    with block:
        pass
    with pytest.raises(RoutingError, match="entered already"), block:
        pass
    twice = lk.use(model, "b")
    with twice, pytest.raises(RoutingError, match="entered already"), twice:
        pass
    assert torch.equal(model(X), outputs(model)["a"])


def test_making_a_block_without_entering_it_does_nothing(model: nn.Module) -> None:
    before = picture(model)
    lk.use(model, "b")
    assert picture(model) == before


@pytest.mark.parametrize("route", [{"route": "b"}, {"rows": ["a", "b", None, "a", "b"]}])
def test_an_exception_inside_leaves_nothing_behind(model: nn.Module, route: dict[str, Any]) -> None:
    want = outputs(model)
    before = picture(model)
    armed = model.norm.register_forward_pre_hook(lambda m, i: 1 / 0)
    with pytest.raises(ZeroDivisionError), lk.use(model, **route):
        model(X)
    armed.remove()
    assert picture(model) == before
    assert torch.equal(model(X), want["a"])
    lk.merge(model, "a")  # no block counts as open
    lk.detach(model)


def test_rows_that_do_not_fit_leave_nothing_behind(model: nn.Module) -> None:
    want = outputs(model)
    with pytest.raises(RoutingError, match="names 2 rows"), lk.use(model, rows=["a", "b"]):
        model(X)
    assert torch.equal(model(X), want["a"])


# ---- rows ---------------------------------------------------------------------------------------------------------
ROWS = ["a", None, "b", "a", {"a": 0.5, "b": 2.0}]


def each_alone(model: nn.Module, x: Tensor, rows: list[Any]) -> Tensor:
    """The rows one by one, each under its own route."""
    parts = []
    for i, row in enumerate(rows):
        with torch.no_grad(), lk.use(model, row):
            parts.append(model(x[i : i + 1]))
    return torch.cat(parts)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "method", [lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2)), lk.LoRA(r=2, bias=True)], ids=["lora", "dora", "bias"]
)
def test_rows_equal_the_single_runs(method: Any, grad: bool) -> None:
    model = with_adapters(Mlp(), "a", "b", method=method).eval()
    for x in (X, torch.randn(5, 3, 6), torch.randn(3, 5, 6).transpose(0, 1)):
        with torch.set_grad_enabled(grad), lk.use(model, rows=ROWS):
            torch.testing.assert_close(model(x), each_alone(model, x, ROWS))


def test_rows_train_each_adapter_on_its_own_examples(model: nn.Module) -> None:
    with lk.use(model, rows=["a", "b", None, "a", "b"]):
        model(X).pow(2).sum().backward()
    together = {n: p.grad.clone() for n, p in lk.trainable(model).items()}
    model.zero_grad()
    for name, which in (("a", [0, 3]), ("b", [1, 4])):
        with lk.use(model, name):
            model(X[which]).pow(2).sum().backward()
    for n, p in lk.trainable(model).items():
        torch.testing.assert_close(together[n], p.grad)


def test_a_packed_row_has_a_route_for_each_token(model: nn.Module) -> None:
    want = each_alone(model, X, ROWS)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), lk.use(model, rows=ROWS):
            torch.testing.assert_close(model(X.unsqueeze(0)), want.unsqueeze(0))


def test_a_single_example_without_a_batch_is_never_cut_into_rows(model: nn.Module) -> None:
    with pytest.raises(RoutingError, match=r"size \(6,\)"), lk.use(model, rows=["a"] * 3 + ["b"] * 3):
        model(torch.randn(6))
    conv = with_adapters(nn.Sequential(nn.Conv1d(3, 4, 3)), "a", "b", targets=["0"])
    with pytest.raises(RoutingError, match=r"size \(3, 7\)"), lk.use(conv, rows=["a", "b", None]):
        conv(torch.randn(3, 7))


def test_rows_reach_embeddings() -> None:
    model = with_adapters(TiedLm(tied=False), "a", "b", targets=["embed", "head"])
    ids = torch.randint(11, (5, 3))
    with torch.no_grad(), lk.use(model, rows=ROWS):
        torch.testing.assert_close(model(ids), each_alone(model, ids, ROWS))


def test_no_rows_for_no_examples(model: nn.Module) -> None:
    with torch.no_grad(), lk.use(model, rows=[]):
        assert model(X[:0]).shape == (0, 4)


# ---- threads and tasks --------------------------------------------------------------------------------------------
def test_two_threads_run_two_adapters_of_one_model_at_the_same_time(model: nn.Module) -> None:
    want = outputs(model)
    together = threading.Barrier(3)
    wrong: list[str] = []

    def work(route: Any, expected: Tensor) -> None:
        for _ in range(150):
            together.wait(timeout=30)
            if route == "default":
                got = model(X)
            else:
                with lk.use(model, route):
                    got = model(X)
            if not torch.equal(got, expected):
                wrong.append(str(route))

    jobs = [("b", want["b"]), (None, want[None]), ("default", want["a"])]
    with torch.no_grad(), concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: work(*job), jobs))
    assert wrong == []


def test_threads_may_mix_blocks_and_rows_while_gradients_are_taken(model: nn.Module) -> None:
    def gradients(name: str) -> dict[str, Tensor]:
        with lk.use(model, name):
            loss = model(X).pow(2).sum()
            mine = {n: p for n, p in lk.trainable(model).items() if f".{name}." in n}
            return dict(zip(mine, torch.autograd.grad(loss, list(mine.values())), strict=True))

    want = {name: gradients(name) for name in "ab"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for name, got in zip("ab" * 30, pool.map(gradients, "ab" * 30), strict=True):
            for key, gradient in got.items():
                assert torch.equal(gradient, want[name][key])


def test_a_new_thread_starts_with_the_default_and_keeps_no_block(model: nn.Module) -> None:
    want = outputs(model)
    got: list[Tensor] = []

    def work() -> None:  # newer Pythons may hand a thread its maker's context: a fresh one is what most give
        contextvars.Context().run(lambda: got.append(model(X).detach()))

    with lk.use(model, "b"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(got[0], want["a"])


def test_each_asyncio_task_has_its_own_route(model: nn.Module) -> None:
    want = outputs(model)

    async def work(name: Any) -> bool:
        right = True
        for _ in range(25):
            with lk.use(model, name):
                await asyncio.sleep(0)
                right &= torch.equal(model(X).detach(), want[name])
                await asyncio.sleep(0)
            right &= torch.equal(model(X).detach(), want["a"])
            await asyncio.sleep(0)
        return right

    async def run() -> list[bool]:
        return await asyncio.gather(*(work(name) for name in ("a", "b", None, "b")))

    assert asyncio.run(run()) == [True] * 4


def test_a_task_started_inside_a_block_keeps_its_route_until_the_block_ends(model: nn.Module) -> None:
    want = outputs(model)

    async def run() -> tuple[Tensor, Tensor, Tensor]:
        go = asyncio.Event()

        async def child() -> tuple[Tensor, Tensor]:
            inside = model(X).detach()
            await go.wait()
            return inside, model(X).detach()

        with lk.use(model, "b"):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
            pooled = await asyncio.to_thread(lambda: model(X).detach())
        go.set()
        return (*(await task), pooled)

    inside, after, pooled = asyncio.run(run())
    assert torch.equal(inside, want["b"])
    assert torch.equal(pooled, want["b"])
    assert torch.equal(after, want["a"])


def test_a_generator_that_is_closed_or_collected_closes_its_block(model: nn.Module) -> None:
    want = outputs(model)

    def stream(name: str) -> Iterator[Tensor]:
        with lk.use(model, name):
            while True:
                yield model(X).detach()

    one, two = stream("a"), stream("b")
    assert torch.equal(next(one), want["a"])
    assert torch.equal(next(two), want["b"])
    one.close()  # in the order opened, not the reverse
    assert torch.equal(next(two), want["b"])
    del two
    assert torch.equal(model(X), want["a"])
    lk.merge(model, "a")  # none is open any more


def test_a_block_that_is_closed_in_another_context_than_it_was_opened_in(model: nn.Module) -> None:
    want = outputs(model)
    block = lk.use(model, "b")
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    assert torch.equal(model(X), want["a"])
    lk.merge(model, "a")


# ---- merged weights and routes ------------------------------------------------------------------------------------
def test_routes_beside_what_is_merged(model: nn.Module) -> None:
    with lk.use(model, ["a", "b"]):
        both = model(X).detach()
    want = outputs(model)
    lk.merge(model, "a")
    with lk.use(model, "a"):
        torch.testing.assert_close(model(X), want["a"])
    with lk.use(model, ["a", "b"]):
        torch.testing.assert_close(model(X), both)
    for route in ("b", None, {"a": 0.5}, {"a": 0.5, "b": 1}):
        before = picture(model)
        with pytest.raises(RoutingError, match=r"include a.*unmerge"), lk.use(model, route):
            pass
        with pytest.raises(RoutingError, match="unmerge"):
            lk.set_active(model, route)
        assert picture(model) == before
    with pytest.raises(RoutingError, match="unmerge"), lk.use(model, rows=["a", "b", "a", "a", "a"]):
        pass
    rows = ["a", ["a", "b"], "a", ["a", "b"], "a"]
    with lk.use(model, rows=rows):
        mixed = model(X)
    lk.unmerge(model)
    torch.testing.assert_close(mixed, each_alone(model, X, rows))


@pytest.mark.parametrize(
    ("method", "targets"),
    [(lk.DoRA(lk.LoRA(r=2)), None), (lk.FullFineTuning(), ["fc1"]), (lk.BitFit(), ["fc1.bias"])],
    ids=["dora", "full", "bitfit"],
)
def test_what_is_measured_from_the_base_cannot_act_on_top_of_a_merge(method: Any, targets: Any) -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2, bias=True), name="a")
    lk.attach(model, method, targets, name="d")
    fill(model)
    lk.merge(model, "a")
    before = picture(model)
    for attempt in (
        lambda: lk.use(model, ["a", "d"]),
        lambda: lk.use(model, rows=["a", ["a", "d"]]),
        lambda: lk.set_active(model, ["a", "d"]),
    ):
        with pytest.raises(RoutingError, match=r"'d' .*measured from the base"):
            attempt()
    assert picture(model) == before


def test_it_may_where_it_changes_other_weights() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2), ["fc1"], name="a")
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), ["fc2"], name="d")
    fill(model)
    with lk.use(model, ["a", "d"]):
        both = model(X)
    lk.merge(model, "a")
    with lk.use(model, ["a", "d"]):
        torch.testing.assert_close(model(X), both)


def test_a_block_made_before_a_merge_is_refused_after_it(model: nn.Module) -> None:
    block = lk.use(model, "a")
    lk.merge(model, "a")
    with pytest.raises(RoutingError, match="merged or unmerged after"), block:
        pass
    block = lk.use(model, "a")
    lk.unmerge(model)
    with pytest.raises(RoutingError, match=r"call lorakit\.use again"), block:
        pass
