"""bfloat16 in the interpreter, with the shim of bfloat16.py, against torch's; without it, that it is needed."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from bfloat16 import exact_bfloat16
from triton.runtime.interpreter import InterpreterBuilder


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + row * N + column), tl.load(b + row * N + column), tl.full([N, N], 1.0, tl.float32))
    tl.store(c + row * N + column, product)


@triton.jit
def add_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def choose_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.where(at % 2 == 0, tl.load(x + at), tl.load(x + at, mask=at < 0, other=0.0)))


@triton.jit
def toward_zero_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, N=x.numel())
    return y


def same(a, b):
    """Bit by bit, but that any NaN is like any other."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def every_bfloat16():
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def float32_bits(upper, lower):
    """float32 numbers with these halves."""
    bits = torch.tensor(upper, dtype=torch.int64)[:, None] << 16 | torch.tensor(lower, dtype=torch.int64)
    return bits.flatten().to(torch.int32).view(torch.float32)


# zero, subnormals, one, an odd mantissa, the largest, infinity, NaN, each with both signs; below, at and above ties
UPPER = [sign | x for sign in (0, 0x8000) for x in (0, 1, 0x7F, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0)]
LOWER = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF]


def test_every_number_widens():
    x = every_bfloat16()
    with exact_bfloat16():
        assert same(cast(x, torch.float32), x.float())
        assert same(cast(x, torch.bfloat16), x)
        assert same(cast(x, torch.float16), x.half())
    assert not same(cast(x, torch.float32), x.float()), "subnormals: the shim is not needed"


def test_narrowing_rounds_to_nearest_even():
    x = torch.cat([float32_bits(UPPER, LOWER), torch.randn(128)])
    half = torch.randn(256).half()
    with exact_bfloat16():
        assert same(cast(x, torch.bfloat16), x.bfloat16())
        assert same(cast(half, torch.bfloat16), half.bfloat16())
    assert not same(cast(x, torch.bfloat16), x.bfloat16()), "rounding: the shim is not needed"


@pytest.mark.parametrize("shim", [True, False])
def test_products_accumulate_in_float32(shim):
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    c = torch.empty(32, 32)
    with exact_bfloat16() if shim else contextlib.nullcontext():
        dot_kernel[(1,)](a, b, c, N=32)
    error = (c - (a.double() @ b.double() + 1)).abs().max()
    assert error < 1e-5 if shim else error > 1, "products: the shim is not needed"


@exact_bfloat16()
def test_choices_keep_bits():
    x, y = torch.randn(32).bfloat16(), torch.empty(32).bfloat16()
    choose_kernel[(1,)](x, y, N=32)
    assert torch.equal(y, torch.where(torch.arange(32) % 2 == 0, x, 0.0))


@exact_bfloat16()
@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        (add_kernel, torch.bfloat16, "arithmetic in bfloat16"),
        (toward_zero_kernel, torch.float32, "that rounds by"),
        (cast_kernel, torch.float64, "a cast from fp64"),
    ],
)
def test_what_would_be_wrong_raises(kernel, dtype, message):
    x, y = torch.ones(16, dtype=dtype), torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(Exception) as raised:
        kernel[(1,)](x, y, N=16)
    assert message in f"{raised.value} {raised.value.__cause__}"


def test_a_triton_without_the_hooks(monkeypatch):
    monkeypatch.delattr(InterpreterBuilder, "cast_impl")
    with pytest.raises(RuntimeError, match=r"has no cast_impl"), exact_bfloat16():
        pass


def test_everything_is_as_it_was_afterwards():
    before = dict(vars(InterpreterBuilder))
    with exact_bfloat16():
        assert dict(vars(InterpreterBuilder)) != before
    assert dict(vars(InterpreterBuilder)) == before
