"""Ops without texts among their arguments: what is spelled in numbers, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from tree_cases import CASES

from treespec_compiler.codegen import cpu
from treespec_compiler.ir import library, ops
from treespec_compiler.ir.linear import NUMBERED_FORMS
from treespec_compiler.ir.narrow import FORMS
from treespec_compiler.ir.numbered import numbered_schema

PLAIN = (torch.BoolType, torch.DeviceObjType, torch.FloatType, torch.IntType, torch.TensorType)
"""What torch's stable interface takes, and options of it."""


def test_a_schema_in_numbers() -> None:
    assert numbered_schema('(Tensor(a!) x, Tensor? b, SymInt n=0, str form="") -> Tensor') == (
        "(Tensor(a!) x, Tensor? b, SymInt n, int form) -> Tensor"
    )


@pytest.mark.parametrize(
    "op", [ops.tree_attention, ops.packed_linear, ops.packed_embedding, cpu.TREE_ATTENTION, cpu.PACKED_LINEAR], ids=str
)
def test_it_takes_what_is_plain(op: torch._ops.OpOverload) -> None:
    found = library.numbered(op, dict.fromkeys(a.name for a in op._schema.arguments if not a.has_default_value()))
    assert found is not None
    for argument in found[0]._schema.arguments:
        kind = argument.type
        assert isinstance(kind.getElementType() if isinstance(kind, torch.OptionalType) else kind, PLAIN)
        assert not argument.has_default_value()  # NOTE AOTAutograd leaves out what equals a default


def test_every_form_has_a_number() -> None:
    assert set(NUMBERED_FORMS) == {"", "float32", *FORMS}


def test_a_pattern_has_none() -> None:
    values = dict(zip((a.name for a in ops.tree_attention._schema.arguments), CASES["extend"].arguments()))
    assert library.numbered(ops.tree_attention, values | {"style": "interleaved"}) is not None
    assert library.numbered(ops.tree_attention, values | {"pattern": "q - k < 3"}) is None


def test_others_stay_what_they_are() -> None:
    for op in (ops.grouped_linear, ops.stochastic_accept, torch.ops.aten.silu.default, torch.relu):
        assert library.numbered(op, {}) is None


@pytest.mark.parametrize("number", [-1, len(NUMBERED_FORMS)])
@pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
def test_a_number_of_no_form(number: int) -> None:
    with pytest.raises(RuntimeError, match="knows no form number"):
        torch.ops.treespec_cpu.packed_linear.numbered(torch.ones(1, 4), torch.ones(1, 4, 32), None, 5, number)


def test_a_graph_keeps_its_meaning() -> None:
    from treespec_compiler.program.lowering import _spell_in_numbers

    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    call = graph.call_function(ops.packed_linear, (x, w, None), {"out_features": 45, "form": "float32"})
    graph.output(graph.call_function(torch.relu, (call,)))
    module = fx.GraphModule(torch.nn.Module(), graph)
    inputs = torch.randn(3, 8), ops.pack_weight(torch.randn(45, 8))
    want = module(*inputs)
    _spell_in_numbers(module)
    assert call.target is torch.ops.treespec.packed_linear.numbered and call.kwargs == {}
    assert torch.equal(module(*inputs), want)
