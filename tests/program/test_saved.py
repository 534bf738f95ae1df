"""Programs as JSON and tensors, and back: the same graph, the same proofs, the same rows."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from zoo import make

import treespec_compiler as treespec
from treespec_compiler.cli.coverage.models import tiny_model
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.program.saved.graph import GraphReader, GraphWriter
from treespec_compiler.program.saved.state import PLAIN, history_of, history_text, state_of, state_text
from treespec_compiler.program.saved.values import (
    TRANSFORMERS,
    CannotLoad,
    CannotSave,
    SizeTexts,
    argument,
    argument_of,
    fake_of,
    size_of,
    target_of,
    target_text,
)
from treespec_compiler.program.semantics import run_graph
from treespec_compiler.program.tree_program import TreeProgram
from treespec_compiler.tree import TokenTree

TREE = TokenTree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2])
PREFIX = [1, 2, 3, 4, 11, 12]


def converted(model: nn.Module) -> TreeProgram:
    return treespec.tree_program(model, options={"lowering": "eager"})


def again(state: GraphState) -> GraphState:
    """The state, by way of text."""
    text, tensors = state_text(state)
    return state_of(json.loads(json.dumps(text)), tensors, state.weights.read)


def lines(state: GraphState) -> list[Any]:
    """Everything of the graph's nodes that is saved, with sizes in terms of T."""

    def shown(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), str(value.device), *map(shown, value.shape), *map(shown, value.stride())]
        if isinstance(value, (tuple, list)):
            return [shown(v) for v in value]
        return str(value.node.expr).replace(str(state.length), "T") if isinstance(value, torch.SymInt) else value

    meta = ("site", "stack_trace")
    return [
        (n.format_node(), shown(n.meta.get("val")), *(n.meta.get(k) for k in meta), str(n.args), str(n.kwargs))
        for n in state.graph.nodes
    ]


# Of the zoo, one of each kind of program: rotations, tables of positions, windows, softcaps, slopes that are computed,
# constants, parallel layers.
@pytest.mark.family
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "bloom", "falcon"])
def test_a_program_comes_back_as_it_was(name: str) -> None:
    program = converted(tiny_model(name) if name in ("gemma2", "bloom") else make(name))
    state, found = program.state, again(program.state)
    assert lines(found) == lines(state)
    assert [found.weights[k].shape for k in found.weights] == [state.weights[k].shape for k in state.weights]
    assert list(map(str, found.weights.values())) == list(map(str, state.weights.values()))
    for field in ("sites", "states", "positions", "limits", "proved_from", "model_logits", "logits_given", *PLAIN):
        assert getattr(found, field) == getattr(state, field), field
    assert torch.equal(run_graph(found, TREE, PREFIX), run_graph(state, TREE, PREFIX))
    assert history_of(json.loads(json.dumps(history_text(program.history)))) == program.history


def test_every_field_of_a_state_is_saved_or_named_here() -> None:
    by_rule = {"gm", "weights", "sites", "states", "positions", "limits", "proved_from", "model_logits", "logits_given"}
    of_a_process = {"length", "fake_mode", "other_length", "counted", "_forms"}
    refused = {"states"}
    before_the_end = {"guards", "notes"}
    of_ranks = {"cut", "whole_groups", "stage", "whole"}  # such a graph is refused
    of_streams = {"budget", "streaming"}  # such a graph is refused
    known = {*PLAIN, *by_rule, *of_a_process, *before_the_end, *refused, *of_ranks, *of_streams}
    assert {f.name for f in dataclasses.fields(GraphState)} == known


def graph_of(*nodes: dict[str, Any]) -> Any:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    reader = GraphReader([], {}, FakeTensorMode(shape_env=ShapeEnv()), 7)  # type: ignore[arg-type]
    return reader.read({"nodes": list(nodes)})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.call",
        "torch.load",
        "aten.add",
        "aten.__class__.x",
        "aten.add.Tensor.x",
        "",
    ],
)
def test_a_file_calls_ops_and_nothing_else(target: str) -> None:
    with pytest.raises(CannotLoad):
        target_of(target)
    with pytest.raises(CannotLoad):
        graph_of({"name": "x", "op": "call_function", "target": target, "args": {"tuple": ["id"]}})


@pytest.mark.parametrize("op", ["call_method", "call_module"])
def test_a_file_has_no_methods_and_modules(op: str) -> None:
    with pytest.raises(KeyError):
        graph_of({"name": "x", "op": op, "target": "x"})


def test_two_nodes_of_one_name_are_no_graph() -> None:
    with pytest.raises(CannotLoad, match="second node"):
        graph_of({"name": "x", "op": "placeholder"}, {"name": "x", "op": "placeholder"})


@pytest.mark.parametrize(
    "value", [{"eval": "1"}, {}, {"node": "a", "float": "1"}, {"dtype": "Tensor"}, {"device": "no"}]
)
def test_a_file_has_values_of_known_kinds(value: Any) -> None:
    with pytest.raises(CannotLoad):
        argument_of(value, {})


@pytest.mark.parametrize("size", [["Pow", 2, 10**9], ["Exec", 1, 2], "S", 1.5, None])
def test_a_file_has_sizes_of_known_kinds(size: Any) -> None:
    with pytest.raises(CannotLoad):
        size_of(size, 7)  # type: ignore[arg-type]
    with pytest.raises(CannotLoad):
        fake_of({"tensor": ["float32", [size], [1]]}, 7)  # type: ignore[arg-type]


def test_arguments_come_back_with_their_types() -> None:
    value = (1, True, None, 0.1, -0.0, float("inf"), [1, (2,)], torch.float16, torch.strided, torch.device("cpu"))
    found = argument_of(json.loads(json.dumps(argument((*value, torch.preserve_format, slice(None, 3), {"a": 1})))), {})
    assert repr(found) == repr((*value, torch.preserve_format, slice(None, 3), {"a": 1}))


NAMES = ["x\nimport os", "x; y", "class", "", "__import__", 3, "a.b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names(name: Any) -> None:
    """They get into the text that fx makes of a graph."""
    x = {"name": "x", "op": "placeholder"}
    add = {"name": "y", "op": "call_function", "target": "aten.add.Tensor", "args": {"tuple": [{"node": "x"}, 1]}}
    for rows in (
        [{"name": name, "op": "placeholder"}],
        [{"name": "c", "op": "get_attr", "target": name, "constant": "c"}],
        [x, add | {"kwargs": {"dict": [[name, 1]]}}],
    ):
        with pytest.raises(CannotLoad, match="the name"):
            graph_of(*rows)


def user_op(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize("value", [object(), lambda: 1, {1, 2}, 1j])
def test_what_has_no_rule_is_not_saved(value: Any) -> None:
    with pytest.raises(CannotSave):
        argument(value)


def test_an_op_of_a_user_is_not_saved() -> None:
    made = torch.library.custom_op("saved_test::more", user_op, mutates_args=())
    made.register_fake(user_op)
    with pytest.raises(CannotSave, match="somebody registered"):
        target_text(torch.ops.saved_test.more.default)
    with pytest.raises(CannotSave, match="user_op"):
        target_text(user_op)
    with pytest.raises(CannotLoad):
        target_of("saved_test.more.default")


def test_an_op_of_transformers_is_saved_where_its_version_is_known() -> None:
    pytest.importorskip("transformers.integrations.moe")
    op = torch.ops.transformers.grouped_mm_fallback.default
    with pytest.raises(CannotSave, match="somebody registered"):
        target_text(op)  # as a compiled folder writes it, which runs without transformers
    assert target_of(target_text(op, TRANSFORMERS)) is op


def test_a_constant_that_is_no_tensor_is_not_saved() -> None:
    root = nn.Module()
    root.inner = nn.Linear(2, 2)
    graph = fx.Graph()
    graph.output(graph.get_attr("inner.weight"))
    with pytest.raises(CannotSave, match=r"inner\.weight"):
        GraphWriter(SizeTexts(None)).write(fx.GraphModule(root, graph))


def test_a_sum_of_sizes_has_a_name() -> None:
    assert target_of(target_text(torch.sym_sum)) is torch.sym_sum
