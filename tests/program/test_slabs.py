"""Layers that are alike are compiled once: what is alike, where a graph is cut, and that the pieces are the program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracles import assert_decodes
from torch import fx, nn

import treespec_compiler as treespec
from treespec_compiler.program import lowering, slabs
from treespec_compiler.program.slabs import Slab, groups, kind, slab, slots, units

pytest.importorskip("transformers")

pytestmark = pytest.mark.converts  # what is compiled is counted or stood in for

LAYERS = 12


@pytest.fixture(autouse=True)
def _few_layers_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "PIECE", 0)


class Compiles:
    """Stands in for the compiler: graphs run op by op, and are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[fx.Graph] = []
        monkeypatch.setattr(lowering, "_compiled", self._compiled)

    def _compiled(self, root: nn.Module, graph: fx.Graph, *_: Any) -> lowering.Lowered:
        self.graphs.append(graph)
        gm = fx.GraphModule(root, graph)
        return lowering.Lowered(lambda inputs: gm(*inputs), 0.0)

    @property
    def calls(self) -> int:
        return sum(n.op == "call_function" for graph in self.graphs for n in graph.nodes)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    return Compiles(monkeypatch)


def program(model: nn.Module) -> Any:
    return treespec.tree_program(model, options={"lowering": "inductor"})


def calls_of(made: Any) -> int:
    return sum(n.op == "call_function" for n in made.state.graph.nodes)


@pytest.mark.rare
def test_repeated_layers_are_one_compile_and_the_same_program(compiles: Compiles) -> None:
    model = zoo.make("llama", num_hidden_layers=LAYERS)
    made = program(model)
    assert_decodes(model, made, zoo.VOCAB)
    assert len(compiles.graphs) == 3 and compiles.calls < calls_of(made) / 2
    assert made.compile_count == 1


@pytest.mark.rare
def test_kinds_of_layers_in_turn(compiles: Compiles) -> None:
    """Windowed and full attention alternate: neither is taken for the other."""
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    model = zoo.make("qwen2", num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    made = program(model)
    assert_decodes(model, made, zoo.VOCAB)
    assert len(compiles.graphs) > 1 and compiles.calls < calls_of(made) * 0.8


@pytest.mark.rare
def test_a_few_layers_stay_one_graph(compiles: Compiles) -> None:
    model = zoo.make("llama")
    assert_decodes(model, program(model), zoo.VOCAB)
    assert len(compiles.graphs) == 1


def test_what_is_not_worth_a_cut_is_not_cut() -> None:
    assert groups([*range(20)]) == [range(20)]
    assert groups("abc") == [range(3)]


def test_repeats_are_cut_where_they_repeat() -> None:
    found = groups(["first", *["layer"] * 28, "last"])
    assert [i for each in found for i in each] == [*range(30)]
    assert len({len(each) for each in found[1:-1]}) == 1 and len(found) < 20
    pairs = groups(["first", *["a", "b"] * 14, "last"])
    assert all(len(each) % 2 == 0 for each in pairs[1:-1])


def chain(*scales: float) -> fx.Graph:
    """x * scale + x for each scale."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for scale in scales:
        scaled = graph.call_function(torch.ops.aten.mul.Scalar, (value, scale))
        value = graph.call_function(torch.ops.aten.add.Tensor, (scaled, value))
    graph.output((value,))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(2) if node.op != "output" else (torch.zeros(2),)
    return graph


def pieces(graph: fx.Graph, size: int = 2) -> list[Slab]:
    calls = [n for n in graph.nodes if n.op == "call_function"]
    return [slab(calls[i : i + size]) for i in range(0, len(calls), size)]


def test_calls_and_constants_tell_slabs_apart() -> None:
    same, equal, other, whole = pieces(chain(2.0, 2.0, 3.0, 2))
    assert same.structure == equal.structure
    assert same.structure != other.structure
    assert same.structure != whole.structure  # 2 is not 2.0
    assert pieces(chain(0.0))[0].structure != pieces(chain(-0.0))[0].structure


def test_wiring_tells_slabs_apart() -> None:
    straight, crossed = chain(2.0), chain(2.0)
    add = next(n for n in crossed.nodes if n.target is torch.ops.aten.add.Tensor)
    add.args = (add.args[0], add.args[0])
    assert pieces(straight)[0].structure != pieces(crossed)[0].structure


def test_places_are_taken_again() -> None:
    graph = chain(*[2.0] * 6)
    parts = pieces(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    at = slots(parts, inputs, [parts[-1].results[0]])
    assert max(at.values()) == 1 and at[inputs[0]] == 0


def test_a_graph_without_sites_is_not_cut() -> None:
    assert units(chain(2.0, 2.0)) == []


@pytest.mark.parametrize("value", [3, torch.zeros(2, 3).t()[0], (torch.zeros(1),)])
def test_what_cannot_cross_a_cut(value: Any) -> None:
    crosses = kind(value) is not None and value.is_contiguous()
    assert not crosses


def test_slabs_refuse_sizes_that_are_computed() -> None:
    mode = lowering._fresh_mode()
    tokens = lowering._fake(mode, "tokens", torch.zeros(1, 2, dtype=torch.int64))
    assert kind(tokens) is not None
    with mode:
        assert kind(tokens.new_zeros(tokens.shape[1] + 1)) is None


@pytest.mark.rare
def test_the_compiled_slabs_are_the_program() -> None:
    model = zoo.make("llama", num_hidden_layers=LAYERS)
    assert_decodes(model, program(model), zoo.VOCAB)
