"""The compiled low-rank product: equal to the formula, deterministic, and out of the way where it does not belong."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, KernelError
from lorakit.ops import add_low_rank
from lorakit.ops.native import build, load
from lorakit.ops.native.check import check
from lorakit.ops.native.load import Product


@pytest.fixture
def product(library: load.Library) -> Product:
    """The compiled product."""
    return library.product


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(
    *size: int,
    n: int,
    out: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ``y, x, A, B``, with ``B`` laid out as linear targets keep it."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(*size, out, generator=draw).to(dtype)
    x = torch.randn(*size, n, generator=draw).to(dtype)
    A = torch.randn(r, n, generator=draw).to(factors)
    return y, x, A, torch.randn(r, out, generator=draw).to(factors).T


def formula(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    y, x, A, B = (t.double() for t in (y, x, A, B))
    return y + scale * x @ A.mT @ B.mT


def assert_near(got: Tensor, exact: Tensor) -> None:
    """Equal up to the rounding of float32 sums, and of the one rounding to a narrower dtype."""
    size = float(exact.detach().abs().max()) if exact.numel() else 1.0
    step = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=max(step, 1e-5), atol=1e-5 * size)


# Widths beside and between whole vectors, more than one piece of a long sum, every remainder of a tile.
SHAPES = [
    pytest.param(size, n, out, r, id=f"{'x'.join(map(str, size))}, {n} to {out}, r={r}")
    for size, n, out, r in [
        ((1,), 1, 1, 1),
        ((1,), 1024, 1024, 16),
        ((1,), 40, 24, 65),
        ((1, 1), 33, 65, 4),
        ((2,), 16, 31, 2),
        ((5,), 100, 7, 3),
        ((3, 4), 7, 100, 5),
        ((6, 8), 1025, 48, 6),
        ((13,), 2051, 17, 9),
        ((300,), 130, 257, 33),
        ((2, 2, 50), 64, 64, 8),
        ((), 24, 40, 4),
    ]
]


@pytest.mark.parametrize(("size", "n", "out", "r"), SHAPES)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=["A32", "A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_it_is_the_formula(
    product: Product,
    size: tuple[int, ...],
    n: int,
    out: int,
    r: int,
    dtype: torch.dtype,
    factors: torch.dtype,
) -> None:
    y, x, A, B = operands(*size, n=n, out=out, r=r, dtype=dtype, factors=factors)
    exact = formula(y, x, A, B, 0.75)
    own = y.clone()
    assert product(own, x, A, B, 0.75) is own
    assert_near(own, exact)
    transposed = product(y.clone(), x, A, B.contiguous(), 0.75)
    assert transposed is not None
    assert torch.equal(transposed, own), "either layout of B"
    mixed = product(y.float().clone(), x.bfloat16(), A, B, 0.75)  # as under autocast
    assert mixed is not None
    assert_near(mixed, formula(y, x.bfloat16(), A, B, 0.75))


def check_derivatives(product: Product, *operands: Tensor) -> None:
    """Compare the gradients of those operands that require one."""
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in operands]
    y, x, A, B = operands
    got = product(y * 1, x, A, B, 1.5)
    assert got is not None
    G = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [t for t in operands if t.requires_grad]
    exact = torch.autograd.grad(formula(*doubles, 1.5), [t for t in doubles if t.requires_grad], G.double())
    for of, one, other in zip(wanted, torch.autograd.grad(got, wanted, G), exact, strict=True):
        assert one.dtype is of.dtype
        assert one.shape == of.shape
        assert_near(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
@pytest.mark.parametrize(("size", "n", "out", "r"), SHAPES)
def test_derivatives(
    product: Product, size: tuple[int, ...], n: int, out: int, r: int, dtype: torch.dtype
) -> None:
    y, x, A, B = (t.requires_grad_() for t in operands(*size, n=n, out=out, r=r, dtype=dtype))
    check_derivatives(product, y, x, A, B)
    check_derivatives(
        product, y, x, A.detach().bfloat16().requires_grad_(), B.detach().contiguous().requires_grad_()
    )


NEEDS = [n for n in itertools.product([True, False], repeat=4) if any(n)]


@pytest.mark.parametrize(
    "needs", NEEDS, ids=["".join(c for c, n in zip("yxAB", need, strict=True) if n) for need in NEEDS]
)
@pytest.mark.parametrize("tokens", [9, 1])
def test_derivatives_where_they_are_wanted(product: Product, needs: tuple[bool, ...], tokens: int) -> None:
    given = operands(tokens, n=30, out=20, r=3)
    y, x, A, B = (t.requires_grad_(n) for t, n in zip(given, needs, strict=True))
    if x.requires_grad and not A.requires_grad:
        assert product(y * 1, x, A, B, 1.5) is None, "with A frozen the plain operations keep less"
        assert_near(add_low_rank(y * 1, x, A, B, 1.5), formula(y, x, A, B, 1.5))
    else:
        check_derivatives(product, y, x, A, B)


def test_a_gradient_of_any_layout(product: Product) -> None:
    y, x, A, B = operands(6, n=9, out=10, r=2)
    A.requires_grad_()
    got = product(y, x, A, B, 1.0)
    assert got is not None
    got.sum().backward()  # its gradient is one number, expanded
    double = A.detach().double().requires_grad_()
    formula(y.detach(), x, double, B, 1.0).sum().backward()
    assert A.grad is not None
    assert double.grad is not None
    assert_near(A.grad, double.grad)


@pytest.mark.parametrize("tokens", [5, 1])
def test_second_derivatives(product: Product, tokens: int) -> None:
    y, x, A, B = operands(tokens, n=6, out=7, r=2)
    inputs = [t.requires_grad_() for t in (x, A, B)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]

    def second(result: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(result.square().sum(), of, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), of)

    got = product(y * 1, *inputs, 1.5)  # type: ignore[call-arg]
    assert got is not None
    for one, other in zip(second(got, inputs), second(formula(y, *doubles, 1.5), doubles), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


def saved_shapes(product: Product, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> list[torch.Size]:
    """The sizes of the tensors that autograd keeps, in order of size."""
    sizes: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        product(y.clone(), x, A, B, 1.0)
    return sorted(sizes)


def test_it_saves_the_input_and_the_short_rows(product: Product) -> None:
    y, x, A, B = operands(64, n=256, out=192, r=8)
    for own in (A, B, x):
        own.requires_grad_()
    assert saved_shapes(product, y, x, A, B) == sorted([x.shape, A.shape, B.shape, (64, 8)])
    frozen = saved_shapes(product, y, x.detach(), A.detach(), B)
    assert x.shape not in frozen, "with A frozen, B needs the short rows only"


def test_one_tokens_short_row_is_no_tensor(product: Product) -> None:
    y, x, A, B = operands(1, n=32, out=24, r=8)
    A.requires_grad_()
    assert saved_shapes(product, y, x, A, B) == sorted([x.shape, A.shape, B.shape])


def test_a_second_backward_pass(product: Product) -> None:
    """What was kept is there while the graph is, and gone with it."""
    y, x, A, B = (t.requires_grad_() for t in operands(1, n=32, out=24, r=8))
    result = product(y * 1, x, A, B, 1.0)
    assert result is not None
    first = torch.autograd.grad(result.sum(), (x, A, B), retain_graph=True)
    second = torch.autograd.grad(result.sum(), (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result.sum(), (x, A, B))


@pytest.mark.parametrize("shape", ["columns", "corner"])
def test_some_columns_of_a_wider_output(product: Product, shape: str) -> None:
    y, x, A, B = operands(3, 4, n=9, out=30, r=2)
    B = B[10:20].T.contiguous().T
    whole = y.clone()
    part = whole[..., 10:20]
    exact = formula(part, x, A, B, 1.0)
    if shape == "corner":  # its rows do not lie equally far apart
        assert product(part[:, :3], x[:, :3].contiguous(), A, B, 1.0) is None
        return
    assert product(part, x, A, B, 1.0) is part
    assert_near(part, exact)
    assert torch.equal(whole[..., :10], y[..., :10])
    assert torch.equal(whole[..., 20:], y[..., 20:])


def test_a_part_of_an_output_with_a_gradient(product: Product) -> None:
    y, x, A, B = operands(3, 4, n=9, out=30, r=2)
    B = B[10:20].T.contiguous().T
    for t in (y, A):
        t.requires_grad_()
    whole = y * 2
    product(whole[..., 10:20], x, A, B, 1.0)
    whole.square().sum().backward()
    dy, dA = (t.detach().double().requires_grad_() for t in (y, A))
    exact = dy * 2
    exact = torch.cat([exact[..., :10], formula(exact[..., 10:20], x, dA, B, 1.0), exact[..., 20:]], -1)
    exact.square().sum().backward()
    for one, other in ((y, dy), (A, dA)):
        assert one.grad is not None
        assert other.grad is not None
        assert_near(one.grad, other.grad)


# ---- the same bits --------------------------------------------------------------------------------------------------
def all_results(product: Product, dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    """The output and all derivatives, of work enough for two threads."""
    y, x, A, B = operands(700, n=520, out=330, r=20, dtype=dtype)
    y, x = y[rows].clone(), x[rows].clone().requires_grad_()
    A.requires_grad_()
    B.requires_grad_()
    got = product(y, x, A, B, 0.5)
    assert got is not None
    return [got.detach(), *torch.autograd.grad(got, (x, A, B), torch.ones_like(got))]


def test_the_check_of_a_build_can_fail(product: Product) -> None:
    check(product)

    def wrong(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
        return product(y, x, A, B, scale * 1.001)

    with pytest.raises(AssertionError):
        check(wrong)
    with pytest.raises(AssertionError, match="refuses"):
        check(lambda *_: None)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_the_number_of_threads_changes_no_bit(product: Product, dtype: torch.dtype) -> None:
    two = all_results(product, dtype)
    torch.set_num_threads(1)
    one = all_results(product, dtype)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 8), slice(3, 17), slice(100, 700)], ids=str)
def test_a_row_does_not_depend_on_the_others(product: Product, rows: slice) -> None:
    whole, alone = all_results(product, torch.float32), all_results(product, torch.float32, rows)
    assert torch.equal(whole[0][rows], alone[0])
    assert torch.equal(whole[1][rows], alone[1])


def test_it_works_in_torchs_threads(product: Product) -> None:
    """No second OpenMP: one such library is in the process, the one that torch brought."""
    product(*operands(2000, n=256, out=256, r=16), 1.0)
    loaded = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line
    }
    assert len(loaded) == 1, loaded


# ---- special values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_what_is_not_finite_comes_through(product: Product, value: float, dtype: torch.dtype) -> None:
    for which, row, column in ((0, 3, 20), (1, 3, 39), (2, 1, 39), (3, 20, 1)):
        y, x, A, B = operands(9, n=40, out=37, r=3, dtype=dtype)
        (y, x, A, B)[which][row, column] = value
        plain = y.float() + x.float() @ A.T @ B.T
        got = product(y.clone(), x, A, B, 1.0)
        assert got is not None
        assert torch.equal(got.isnan(), plain.isnan())
        assert torch.equal(got.isinf(), plain.isinf())
        assert not got.isfinite().all()


def test_factors_of_zero_change_no_bit(product: Product) -> None:
    y, x, A, B = operands(9, n=40, out=37, r=3)
    assert torch.equal(product(y.clone(), x, A, torch.zeros_like(B), 2.0), y)  # type: ignore[arg-type]


# ---- what is left to torch ------------------------------------------------------------------------------------------
class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_what_it_does_not_take_is_left_untouched(product: Product) -> None:
    y, x, A, B = operands(4, n=6, out=5, r=2)
    before = y.clone()
    refused = {
        "float64": [t.double() for t in (y, x, A, B)],
        "float16": [t.half() for t in (y, x, A, B)],
        "another size": [y, x[:3], A, B],
        "empty": [y[:0], x[:0], A, B],
        "scattered x": [y, x.T.contiguous().T, A, B],
        "scattered A": [y, x, A.T.contiguous().T, B],
        "a subclass": [y, x.as_subclass(type("Own", (Tensor,), {})), A, B],
        "no device": [t.to("meta") for t in (y, x, A, B)],
        "conjugate": [t.to(torch.complex64).conj() for t in (y, x, A, B)],
    }
    for why, arguments in refused.items():
        assert product(*arguments, 1.0) is None, why  # type: ignore[call-arg]
    with Watching():
        assert product(y, x, A, B, 1.0) is None
    with torch.autograd.forward_ad.dual_level():
        assert product(y, torch.autograd.forward_ad.make_dual(x, x), A, B, 1.0) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(product(row, row, row, row, 1.0)) or row)(y)
    torch.jit.trace(lambda t: seen.append(product(t, x, A, B, 1.0)) or t + 1, (y,), check_trace=False)
    assert seen == [None, None]
    assert torch.equal(y, before)
    with pytest.raises(TypeError):
        product(y, x, A, B)  # type: ignore[call-arg]


def test_large_factors_are_left_to_torch_where_there_are_many_tokens(product: Product) -> None:
    y, x, A, B = operands(60, n=2048, out=40, r=64)
    assert product(y.clone(), x, A, B, 1.0) is None
    few = product(y[:40].clone(), x[:40], A, B, 1.0)
    assert few is not None
    assert_near(few, formula(y[:40], x[:40], A, B, 1.0))
    assert_near(add_low_rank(y.clone(), x, A, B), formula(y, x, A, B, 1.0))


def test_inference_tensors_and_versions(product: Product) -> None:
    y, x, A, B = operands(4, n=6, out=5, r=2)
    version = y._version
    product(y, x, A, B, 1.0)
    assert y._version == version + 1
    with torch.inference_mode():
        frozen = y.clone()
        assert product(frozen, x, A, B, 1.0) is frozen
    with pytest.raises(RuntimeError, match="nference"):
        product(frozen, x, A, B, 1.0)


def test_a_leaf_is_protected_as_torch_protects_it(product: Product) -> None:
    y, x, A, B = operands(4, n=6, out=5, r=2)
    y.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        product(y, x, A, B, 1.0)


# ---- which way is taken ---------------------------------------------------------------------------------------------
def calls_of(monkeypatch: pytest.MonkeyPatch, product: Product) -> list[bool]:
    """Whether the compiled product took each call from here on."""
    calls: list[bool] = []

    def counted(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
        result = product(y, x, A, B, scale)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(load, "product", counted)
    return calls


def test_the_fused_product_uses_it(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, product)
    y, x, A, B = operands(4, n=6, out=5, r=2)
    exact = formula(y, x, A, B, 2.0)
    assert_near(add_low_rank(y.clone(), x, A, B, 2.0), exact)
    assert calls == [True]
    torch.testing.assert_close(
        add_low_rank(y.double(), x.double(), A.double(), B.double(), 2.0), exact, rtol=1e-12, atol=1e-12
    )
    assert calls == [True, False]
    add_low_rank(y.clone(), x, A, B, 2.0, 0.5)
    assert calls == [True, False], "dropout is not its business"


def test_a_whole_layer_trains_the_same(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(compiled: Product | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
        lk.attach(model, lk.LoRA(r=3), targets="all-linear")
        with torch.no_grad():
            for parameter in lk.trainable(model).values():
                parameter.normal_()
        monkeypatch.setattr(load, "product", compiled)
        monkeypatch.setattr(load, "layer", None)
        out = model(torch.randn(2, 5, 12))
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in lk.trainable(model).values() if p.grad is not None)]

    for one, other in zip(gradients(product), gradients(None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_under_activation_checkpointing_what_was_saved_is_fetched_once(product: Product) -> None:
    """What checkpointing computes again can be unpacked once and no second time."""
    y, x, A, B = operands(3, 4, n=8, out=6, r=2)
    wanted = [t.requires_grad_() for t in (x, A, B)]

    def add(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return product(y.clone(), x, A, B, 0.5)  # type: ignore[return-value]

    expected = torch.autograd.grad(add(x, A, B).square().sum(), wanted)
    again = torch.utils.checkpoint.checkpoint(add, x, A, B, use_reentrant=False)
    got = torch.autograd.grad(again.square().sum(), wanted)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_a_compiler_of_graphs_does_not_meet_it(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, product)
    y, x, A, B = operands(4, n=6, out=5, r=2)
    compiled = torch.compile(lambda *t: add_low_rank(t[0] * 1, *t[1:]), backend="eager", fullgraph=True)
    assert_near(compiled(y, x, A, B), formula(y, x, A, B, 1.0))
    assert calls == []


@pytest.mark.usefixtures("resolve_again")
def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(load.SWITCH, "off")
    load.forget()
    assert load.status().state == "off"
    y, x, A, B = operands(4, n=6, out=5, r=2)
    assert_near(add_low_rank(y.clone(), x, A, B), formula(y, x, A, B, 1.0))
    assert load.product is None
    assert load.layer is None


@pytest.mark.usefixtures("resolve_again")
def test_a_switch_that_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(load.SWITCH, "of")
    load.forget()
    with pytest.raises(ConfigError, match="LORAKIT_KERNELS='of' means nothing"):
        load.status()


@pytest.mark.usefixtures("resolve_again")
def test_nothing_is_built_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    load.forget()
    y, x, A, B = operands(4, n=6, out=5, r=2)
    assert_near(add_low_rank(y.clone(), x, A, B), formula(y, x, A, B, 1.0))
    assert load.status().state == "not built"
    assert list(tmp_path.iterdir()) == []


def test_importing_looks_for_nothing() -> None:
    code = (
        "import lorakit as lk; lk.LoRA; lk.attach\n"
        "from lorakit.ops.native import load\n"
        "assert load.product is load._look_first\n"
        "import sys; assert 'lorakit.ops.native.build' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- a library in the cache -----------------------------------------------------------------------------------------
@pytest.fixture
def own_cache(product: Product, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resolve_again: None) -> Path:
    """A cache of this test's own that holds the library; returns the library's folder."""
    built = load.kernel_folder()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    shutil.copytree(built, load.kernel_folder())
    load.forget()
    return load.kernel_folder()


def test_a_sound_library_is_not_built_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build() == own_cache
    assert load.status().state == "compiled"


@pytest.mark.parametrize("damage", ["cut short", "one bit", "gone", "record"])
def test_a_damaged_library_is_not_loaded(
    own_cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = own_cache / load.LIBRARY
    content = bytearray(library.read_bytes())
    if damage == "cut short":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[-100] ^= 1
        library.write_bytes(content)
    elif damage == "gone":
        library.unlink()
    else:
        (own_cache / load.RECORD).write_text("{")
    with pytest.warns(RuntimeWarning, match="is not used: .*lorakit kernels build"):
        assert load.status().state == "unusable"
    assert load.product is None
    assert load.layer is None
    y, x, A, B = operands(4, n=6, out=5, r=2)
    assert_near(add_low_rank(y.clone(), x, A, B), formula(y, x, A, B, 1.0))
    # `build` knows that it is damaged: it does not take it for done, and a failure changes nothing.
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match="'no-such-compiler' is not a program here"):
        build.build()
    assert own_cache.exists()


def test_a_library_that_is_none(own_cache: Path) -> None:
    (own_cache / load.LIBRARY).write_bytes(b"nothing")
    record = {"sha256": "1785cfc3bc6ac7738e8b38cdccd1af12563c2b9070e07af336a1bf8c0f772b6a"}
    (own_cache / load.RECORD).write_text(json.dumps(record))
    with pytest.raises(KernelError, match="cannot be loaded"):
        load.read_library(own_cache)


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_compiler_gives_its_reason(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = compiler(own_cache.parent, "echo low_rank.cpp: In function; echo 'x.cpp:1: error: no'; exit 1")
    monkeypatch.setenv("CXX", fails)
    before = sorted(own_cache.parent.rglob("*"))
    with pytest.raises(KernelError, match=r"failed: x\.cpp:1: error: no") as told:
        build.build(force=True)
    assert "\n" not in str(told.value)
    assert sorted(own_cache.parent.rglob("*")) == before, "nothing is left over, nothing is lost"
    assert load.status().state == "compiled"


def test_a_library_that_does_not_work_is_not_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(own_cache)
    makes = compiler(own_cache.parent, 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"')
    monkeypatch.setenv("CXX", makes)
    with pytest.raises(KernelError, match=r"compiled but does not work here: .*cannot be loaded"):
        build.build()
    assert not own_cache.exists()
    assert load.status().state == "not built"


def test_a_new_library_replaces_the_old_one_whole(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that copies the sound library stands for the real one, which takes half a minute."""
    sound = own_cache.parent / "sound.so"
    shutil.copy(own_cache / load.LIBRARY, sound)
    (own_cache / load.LIBRARY).write_bytes(b"damaged")
    copies = compiler(own_cache.parent, f'while [ "$1" != -o ]; do shift; done; cp {sound} "$2"')
    monkeypatch.setenv("CXX", copies)
    assert build.build() == own_cache
    assert load.status().state == "compiled"
    assert sorted(path.name for path in own_cache.iterdir()) == sorted([load.LIBRARY, load.RECORD])
    assert not list(own_cache.parent.glob(".building-*"))


def test_other_facts_mean_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here = load.kernel_folder()
    monkeypatch.setattr(load, "processor", lambda: "flags: another one")
    there = load.kernel_folder()
    assert there != here
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert load.kernel_folder() not in (here, there)
