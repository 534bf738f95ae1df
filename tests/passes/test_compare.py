"""Structural comparison: names and order do not count, computations do."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graph_cases import deep, graphs

from treespec_compiler.cli.main import main
from treespec_compiler.passes.show.compare import compare
from treespec_compiler.passes.show.restore import restore
from treespec_compiler.passes.show.snapshot import NodeData, Snapshot


def renamed(graph: Snapshot) -> Snapshot:
    names = {n.name: f"v{i}" for i, n in enumerate(graph.nodes)}

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {"node": names[value["node"]]} if "node" in value else {k: change(v) for k, v in value.items()}
        return [change(v) for v in value] if isinstance(value, (list, tuple)) else value

    nodes = [replace(n, name=names[n.name], args=change(n.args), kwargs=change(n.kwargs)) for n in graph.nodes]
    return replace(graph, nodes=tuple(nodes), tokens=names[graph.tokens])


def reordered(graph: Snapshot, seed: int = 0) -> Snapshot:
    """Another topological order."""
    rng, waiting, done, nodes = random.Random(seed), list(graph.nodes), set(), []
    while waiting:
        ready = [n for n in waiting if set(n.inputs) <= done and (n.op != "output" or len(waiting) == 1)]
        chosen = rng.choice(ready)
        waiting.remove(chosen)
        done.add(chosen.name)
        nodes.append(chosen)
    return replace(graph, nodes=tuple(nodes))


def test_renamed_and_reordered_graphs_are_equal() -> None:
    graph = graphs()["classify"]
    assert compare(graph, graph).equal
    assert compare(graph, renamed(graph)).equal
    assert compare(graph, reordered(graph)).equal
    assert compare(renamed(reordered(graph, 1)), graph).equal


def test_a_changed_literal_is_one_change() -> None:
    graph = graphs()["classify"]
    index = next(i for i, n in enumerate(graph.nodes) if n.short_target == "aten.relu")
    old = graph.nodes[index]
    nodes = [*graph.nodes]
    nodes[index] = replace(old, target="aten.silu.default")
    found = compare(graph, renamed(replace(graph, nodes=tuple(nodes))))
    assert found.removed == [old.name] and found.added == [f"v{index}"]
    users = [n.name for n in graph.nodes if old.name in n.inputs]
    assert sorted(found.changed) == users  # what follows is the same computation of a changed value


def test_passes_that_only_prove_change_nothing() -> None:
    found = graphs()
    assert compare(found["classify"], found["token locality"]).equal
    between = compare(found["treeify"], found["insert state"])
    assert [n for n in between.removed if "attention" in n] and not between.equal
    added = {between.b[n].short_target for n in between.added if between.b[n].op == "call_function"}
    assert added == {"treespec.tree_attention"}


def test_restored_graph_is_the_same() -> None:
    import torch

    from treespec_compiler.passes.show.snapshot import snapshot

    graph = graphs()["capture"]
    tensors = {}
    for node in graph.nodes:
        if node.label:
            sizes = [int(s) for s in node.type.rstrip("]").split("[")[1].split(",")]
            tensors[node.name] = torch.zeros(sizes)
    again = snapshot(restore(Snapshot.from_json(json.loads(json.dumps(graph.as_json()))), tensors), "capture")
    assert compare(graph, again).equal
    assert [(n.type, n.source, n.layer) for n in again.nodes] == [(n.type, n.source, n.layer) for n in graph.nodes]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = graphs()
    files = {}
    for name in ("classify", "insert state"):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(renamed(found[name]).as_json()))
    (tmp_path / "original.json").write_text(json.dumps(found["classify"].as_json()))
    assert main(["diff", str(tmp_path / "original.json"), str(files["classify"])]) == 0
    assert "0 removed, 0 added, 0 changed" in capsys.readouterr().out
    assert main(["diff", str(files["classify"]), str(files["insert state"])]) == 1
    shown = capsys.readouterr().out
    assert "treespec.causal_attention(" in shown and "treespec.tree_attention(" in shown
    assert "@@ layers.1: changed as layers.0 @@" in shown
    assert main(["diff", str(files["classify"]), str(tmp_path / "nothing.json")]) == 2
    assert "expected a graph written by" in capsys.readouterr().err


@pytest.mark.rare
@pytest.mark.slow
def test_a_deep_model_is_compared() -> None:
    found = graphs(deep)
    between = compare(found["treeify"], found["insert state"])
    assert sum(between.b[n].short_target == "treespec.tree_attention" for n in between.added) == 32


def test_node_inputs_keep_their_order() -> None:
    node = NodeData(
        "x", "call_function", "aten.cat.default", [[{"node": "b"}, {"node": "a"}], -1], {"y": {"node": "c"}}
    )
    assert node.inputs == ["b", "a", "c"]
