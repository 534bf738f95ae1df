"""Pass offload: what is streamed under a budget, and that every fetch and release is needed where it stands."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from zoo import make

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.errors import InvalidOption
from treespec_compiler.ir.streaming import fetch, release
from treespec_compiler.ir.verify import problems
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.passes.offload import offload
from treespec_compiler.passes.streaming.budget import Budget
from treespec_compiler.passes.streaming.plan import layers, make_plan, ring_slots
from treespec_compiler.pipeline import convert

pytest.importorskip("transformers")
FEW = {"num_hidden_layers": 5}


def converted(budget: int | None, slots: int = 2, **changes: Any) -> GraphState:
    offload = None if budget is None else {"resident_gb": budget / 1e9, "slots": slots}
    options = treespec.Options.parse({"lowering": "eager", "offload": offload})
    model = make("llama", **{**FEW, **changes})
    return convert(model, call_spec(model), options).state


@functools.cache
def sizes() -> tuple[int, int]:
    """Bytes of what must stay, and of the largest layer."""
    state = converted(None)
    found = [layer.bytes for layer in layers(state)]
    assert len(found) == 5
    return make_plan(state, Budget(10**12, 2)).resident - sum(found), max(found)


@pytest.mark.rare
def test_too_small_a_budget_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing: a reproducer would hold all weights."""
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    fixed, layer = sizes()
    assert fixed > 0 and layer > 0
    with pytest.raises(InvalidOption, match=f"{fixed + 2 * layer:,}"):
        converted(fixed + 2 * layer - 1)
    assert not (tmp_path / "cache" / "reproducers").exists()
    assert converted(fixed + 2 * layer).streaming is not None


@pytest.mark.parametrize(
    ("layer", "count", "room", "slots"),
    [
        (2_200_000, 30, 10**7, 4),
        (2_200_000, 30, 2 * 2_200_000, 2),  # no room
        (3 << 20, 30, 10**8, 2),  # all but one fit
        (3 << 20, 30, 10**7, 3),
        (10**8, 30, 10**9, 2),
        (1000, 14, 4000, 2),  # few are streamed
    ],
)
def test_small_layers_get_more_slots(layer: int, count: int, room: int, slots: int) -> None:
    assert ring_slots(layer, count, room) == slots


@pytest.mark.rare
def test_layers_that_fit_stay_the_first_ones() -> None:
    fixed, layer = sizes()
    state = converted(fixed + 4 * layer)
    assert state.streaming is not None
    assert [each.of_model for each in state.streaming.layers] == [2, 3, 4]
    assert state.streaming.slots == 2 and state.streaming.resident <= fixed + 2 * layer
    streamed = {name for each in state.streaming.layers for name, _ in each.weights}
    assert streamed == set(state.weights.streamed) and not streamed & set(state.weights)


@pytest.mark.rare
def test_a_model_that_fits_is_left_alone() -> None:
    state = converted(10**9)
    assert state.streaming is None and not any(n.target in (fetch, release) for n in state.graph.nodes)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in (fetch, release)]


@pytest.mark.rare
def test_each_fetch_and_release_is_needed() -> None:
    state = converted(sizes()[0] + 2 * sizes()[1])
    assert state.streaming is not None and problems(state.graph, state.level) == []
    for i in range(len(_calls(state.graph))):
        copy = state.copy()
        copy.graph.erase_node(_calls(copy.graph)[i])
        assert problems(copy.graph, copy.level), f"nothing is wrong without call {i}"


@pytest.mark.rare
def test_a_layer_in_the_place_of_another_is_wrong() -> None:
    state = converted(sizes()[0] + 2 * sizes()[1])
    for i, j in ((0, 2), (1, 3), (0, 4)):
        copy = state.copy()
        calls = _calls(copy.graph)
        calls[i].args, calls[j].args = calls[j].args, calls[i].args
        assert problems(copy.graph, copy.level)


@pytest.mark.rare
def test_a_weight_read_after_its_layer_is_wrong() -> None:
    state = converted(sizes()[0] + 2 * sizes()[1])
    copy = state.copy()
    last = [n for n in copy.graph.nodes if n.target is release][-1]
    place = last.args[2][0]
    with copy.graph.inserting_after(last):
        late = copy.graph.call_function(torch.ops.aten.relu.default, (place,))
    late.meta["val"] = place.meta["val"]
    assert any("no layer is there" in problem for problem in problems(copy.graph, copy.level))


def test_other_devices_are_refused() -> None:
    elsewhere: Any = SimpleNamespace(budget=Budget(0, 2), device=torch.device("cuda"))
    with pytest.raises(InvalidOption, match="a model on cuda"):
        offload(elsewhere)


@pytest.mark.rare
def test_shared_weights_stay() -> None:
    """The embedding that is the head as well."""
    state = converted(sizes()[0] + 2 * sizes()[1], tie_word_embeddings=True)
    assert all("embed" not in name for made in state.weights.streamed.values() for name in made.sources)
