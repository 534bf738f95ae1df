"""Printed Triton code equals the same formula as torch code, on grids: every form of the specs, and random ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parents[2]))

import sympy
from expressions import GRID, booleans, integers, reals, values
from printed import torch_function

from treespec_compiler.codegen.gpu import source
from treespec_compiler.codegen.printer import HELPERS, TRITON, Printer
from treespec_compiler.ir import formulas
from treespec_compiler.ir.formulas import DISTANCES, D, H, K, Q, S
from treespec_compiler.ir.specs import MaskSpec, PositionSpec

KERNEL = """
import triton
import triton.language as tl
{helpers}

@triton.jit
def evaluate({names}, out, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
{loads}
    tl.store(out + i, (i * 0 + ({code})).to(tl.{kind}), mask=mask)
"""


def triton_values(expr, grid, tables=None):
    """`expr` on the broadcast grid, as Triton computes it: float32, or int32 for integers and predicates."""
    tables = tables or {}
    readers = {
        "slopes": lambda h: f"tl.load(slopes + {h})",
        "bias": lambda h, d: f"tl.load(bias + {h} * distances + {d})",
    }
    printer = Printer(TRITON, tables={name: readers[name] for name in tables})
    code = printer.doprint(expr)
    names = [s.name for s in grid]
    real = not getattr(expr, "is_Boolean", False) and not getattr(expr, "is_integer", False)
    text = KERNEL.format(
        names=", ".join([f"{n}_" for n in names] + list(tables)),
        helpers="".join(HELPERS[name] for name in sorted(printer.helpers)),
        loads="\n".join(f"    {n} = tl.load({n}_ + i, mask=mask, other=0)" for n in names),
        code=code,
        kind="float32" if real else "int32",
    )
    kernel = source.load("evaluate", {"expr": str(expr)}, text).evaluate
    flat = [t.contiguous().flatten() for t in torch.broadcast_tensors(*grid.values())]
    flat = [t.int() if not t.is_floating_point() else t for t in flat]
    total = flat[0].numel()
    out = torch.empty(total, dtype=torch.float32 if real else torch.int32)
    kernel[(1,)](*flat, *tables.values(), out, total, BLOCK=1 << (total - 1).bit_length())
    return out.view(torch.broadcast_shapes(*(t.shape for t in grid.values())))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREESPEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


INDEX = torch.arange(12)
GRID_2D = {Q: INDEX[:, None], K: INDEX[None, :]}


@pytest.mark.family
@pytest.mark.parametrize(
    "mask", [MaskSpec(), MaskSpec(1), MaskSpec(5), MaskSpec(100), MaskSpec(chunk=4), MaskSpec(7, chunk=3)], ids=str
)
def test_masks(mask):
    assert torch.equal(triton_values(formulas.predicate(mask), GRID_2D).bool(), mask.visible(*GRID_2D.values()))


@pytest.mark.family
@pytest.mark.parametrize("softcap", [0.0, 0.1, 50.0])
@pytest.mark.parametrize("tables", [(), ("slopes",), ("bias",), ("slopes", "bias")])
def test_scores(softcap, tables):
    heads, far = 3, 5
    made = {"slopes": torch.rand(heads), "bias": torch.randn(heads, far)}
    grid = {
        S: torch.randn(heads, 12) * 60,
        H: torch.arange(heads)[:, None],
        D: INDEX[None, :],
        DISTANCES: torch.tensor([[far]]),
    }
    expr = formulas.score(softcap, "slopes" in tables, "bias" in tables)
    used = {name: made[name] for name in tables}
    expected = torch_function(expr, tuple(grid), tables)(*grid.values(), *used.values())
    got = triton_values(expr, grid, used)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [0, 2])
def test_positions(offset):
    expr = formulas.position(PositionSpec(offset, None, "embedding"))
    assert torch.equal(triton_values(expr, {Q: INDEX}), (INDEX + offset).int())


def test_tanh_of_large_and_small_numbers():
    x = torch.tensor([-1e30, -100.0, -20.0, -1e-3, 0.0, 1e-3, 0.5, 20.0, 100.0, 1e30])
    got = triton_values(sympy.tanh(S), {S: x})
    torch.testing.assert_close(got.double(), x.double().tanh(), rtol=1e-4, atol=1e-7)


@settings(max_examples=25)
@given(integers())
def test_random_integer_expressions(expr):
    assert torch.equal(triton_values(expr, GRID).long(), values(expr).long())


@settings(max_examples=25)
@given(booleans())
def test_random_predicates(expr):
    assert torch.equal(triton_values(expr, GRID).bool(), values(expr).bool())


@settings(max_examples=25)
@given(reals())
def test_random_scores(expr):
    torch.testing.assert_close(triton_values(expr, GRID).double(), values(expr), rtol=1e-4, atol=1e-4)
