"""einsum as products that can be followed: the same numbers as torch's, in every form of equation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.spellings.einsum import parse, spell_einsum

EQUATIONS = [
    ("ij,jk->ik", [(3, 4), (4, 5)]),
    ("bhid,bhjd->bhij", [(1, 2, 3, 4), (1, 2, 5, 4)]),
    ("bhij,bhjd->bhid", [(1, 2, 3, 5), (1, 2, 5, 4)]),
    ("bihd,bjhd->bhij", [(1, 3, 2, 4), (1, 5, 2, 4)]),
    ("bhij,bjhd->bihd", [(1, 2, 3, 5), (1, 5, 2, 4)]),
    ("btd,dhk->bthk", [(1, 3, 4), (4, 2, 5)]),
    ("bthk,hkd->btd", [(1, 3, 2, 5), (2, 5, 4)]),
    ("dhk,btd->bthk", [(4, 2, 5), (1, 3, 4)]),
    ("i,j->ij", [(3,), (4,)]),
    ("i,j", [(3,), (4,)]),
    ("bkgqd,bksd->bkgqs", [(1, 2, 3, 5, 4), (1, 2, 6, 4)]),
    ("...i,...j->...ij", [(2, 3), (2, 4)]),
    ("...d,de->...e", [(2, 3, 4), (4, 5)]),
    ("...td,...sd->...ts", [(2, 3, 4), (5, 4)]),
    ("ii->i", [(3, 3)]),
    ("ii", [(3, 3)]),
    ("ij->j", [(3, 4)]),
    ("ij->ji", [(3, 4)]),
    ("ba", [(3, 4)]),
    ("bi,bi->b", [(3, 4), (3, 4)]),
    ("b,b->", [(3,), (3,)]),
    ("te,ted->td", [(3, 4), (3, 4, 5)]),
    ("td,edf->tef", [(3, 4), (2, 4, 5)]),
    ("tef,efd->ted", [(3, 2, 5), (2, 5, 4)]),
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
    ("bij,bj,j->bi", [(2, 3, 4), (2, 4), (4,)]),
    ("ab,ac,bc->", [(2, 3), (2, 4), (3, 4)]),
    ("bhd,bhd->bh", [(1, 2, 3), (4, 2, 3)]),  # size 1 is broadcast
    ("bq,bk->bqk", [(1, 3), (2, 4)]),
    ("bhqd,bhkd->bhqk", [(1, 4, 3, 2), (1, 1, 5, 2)]),
    ("abij,abjk->ik", [(2, 3, 4, 5), (2, 3, 5, 6)]),
    (" b h i , b i -> b h ", [(2, 3, 4), (2, 4)]),
]


def spelled(equation: str, inputs: list[torch.Tensor]) -> tuple[fx.GraphModule, GraphState]:
    """A graph of the einsum alone, spelled out."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    call = graph.call_function(torch.ops.aten.einsum.default, (equation, nodes))
    graph.output(((call,),))
    mode = FakeTensorMode()
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    with mode:
        call.meta["val"] = torch.einsum(equation, [n.meta["val"] for n in nodes])
    gm = fx.GraphModule({}, graph)
    state: Any = GraphState.__new__(GraphState)
    state.__dict__.update(gm=gm, fake_mode=mode)
    assert spell_einsum(state, call)
    gm.recompile()
    return gm, state


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS, ids=[e for e, _ in EQUATIONS])
def test_the_same_numbers(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gm, _ = spelled(equation, inputs)
    assert not [n for n in gm.graph.nodes if "einsum" in str(n.target)]
    expected = torch.einsum(equation, inputs)
    (got,) = gm(*inputs)[0]
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_other_ops_are_left_alone() -> None:
    node = SimpleNamespace(op="call_function", target=torch.ops.aten.matmul.default)
    assert not spell_einsum(None, node)  # type: ignore[arg-type]


def test_equations_are_written_out() -> None:
    assert parse("...ij,...jk", [4, 3]) == (["abij", "bjk"], "abik")
    assert parse("ba", [2]) == (["ba"], "ab")
