"""Every argument of an aten call, in one form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import EAGER, decoder
from torch import fx

from treespec_compiler.capture.call import call_spec
from treespec_compiler.errors import PassError
from treespec_compiler.ir import ops
from treespec_compiler.ir.arguments import argument, fill, filled, is_filled, short
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.manager import Pass, run_passes
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.pipeline import check_level, prepare

aten = torch.ops.aten

CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, ("x", "y"), {}, ("x", "y"), {"alpha": 1}),
    (aten.add.Scalar, ("x", 2), {}, ("x", 2, 1), {}),
    (aten.slice.Tensor, ("x", 1), {"end": 3}, ("x", 1, None, 3, 1), {}),
    (aten.slice.Tensor, ("x",), {}, ("x", 0, None, None, 1), {}),
    (aten.sum.dim_IntList, ("x", [0]), {"keepdim": True}, ("x", [0], True), {"dtype": None}),
    (aten.sort.stable, ("x",), {"stable": True}, ("x",), {"stable": True, "dim": -1, "descending": False}),
    (aten.where.default, ("x",), {}, ("x",), {}),
    (ops.packed_linear, ("x", "w"), {}, ("x", "w"), {}),  # no op of torch's: as it is
]


@pytest.mark.parametrize(("target", "args", "kwargs", "all_args", "all_kwargs"), CASES, ids=lambda value: str(value))
def test_arguments_are_filled(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], all_args: tuple[Any, ...], all_kwargs: dict[str, Any]
) -> None:
    assert filled(target, args, kwargs) == (all_args, all_kwargs)
    assert filled(target, all_args, all_kwargs) == (all_args, all_kwargs)


def test_an_argument_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.slice.Tensor, (x, 1), {"end": 3})
    assert not is_filled(node)
    before = [argument(node, name) for name in ("dim", "start", "end", "step")]
    assert before == [1, None, 3, 1] and argument(node, "alpha") is None and argument(node, "alpha", 7) == 7
    fill(node)
    assert is_filled(node) and [argument(node, name) for name in ("dim", "start", "end", "step")] == before
    assert short(node) == ((x, 1, None, 3), {})  # what people read
    whole = graph.call_function(aten.add.Tensor, (x, x), {"alpha": 1})
    assert is_filled(whole) and short(whole) == ((x, x), {})
    assert short(graph.call_function(aten.add.Tensor, (x, x), {"alpha": 2})) == ((x, x), {"alpha": 2})


def test_a_call_without_its_arguments_breaks_the_level() -> None:
    prepared = prepare(decoder(), call_spec(decoder()), Options.parse(EAGER))
    state = prepared.state
    run_passes(state, prepared.passes[:1], prepared.checks)
    assert all(is_filled(n) for n in state.graph.nodes)

    def lazy(state: GraphState) -> int:
        with state.graph.inserting_before(state.output):
            new = state.graph.call_function(aten.add.Scalar, (state.logits, 1))
        new.meta["val"] = state.logits.meta["val"]
        state.output.replace_input_with(state.logits, new)
        return 1

    with pytest.raises(PassError, match="an aten call without all its arguments"):
        run_passes(state, [Pass("lazy", lazy, "", "")], [check_level])


def test_closed_forms_are_computed_once_for_a_graph() -> None:
    state = prepare(decoder(), call_spec(decoder()), Options.parse(EAGER)).state
    first = state.closed_forms()
    assert state.closed_forms() is first
    run_passes(state, [Pass("reads", lambda state: 0, "", "")])
    assert state.closed_forms() is first
    state.call(aten.neg.default, (state.logits,), like=state.output)
    assert state.closed_forms() is not first
    second = state.closed_forms()

    def renames(state: GraphState) -> int:
        node = next(n for n in state.graph.nodes if n.target is aten.relu.default)
        node.target = aten.tanh.default
        return 1

    run_passes(state, [Pass("renames", renames, "", "")])
    assert state.closed_forms() is not second
