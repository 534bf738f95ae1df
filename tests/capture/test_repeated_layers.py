"""Tracing each distinct layer once gives what a trace of the whole graph gives, node for node, or is not done."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import DIM, NanoGPT, Tiny
from native_cache import CachedDecoder
from repeated import both, rows
from torch import Tensor, fx, nn


# deepseek_v3 fills a new tensor through its views, mixtral divides in place, falcon adds to what a part of its layer
# gave, gemma2's layers alternate between two masks
@pytest.mark.family
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2", "mixtral", "deepseek_v3"])
def test_as_a_trace_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from treespec_compiler.cli.coverage.models import tiny_model

    made = both(monkeypatch, tiny_model(name).eval())
    assert made.layers is not None, made.reason
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert list(made.layers.graph.nodes)[-1].op == "output"


def test_each_distinct_layer_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = NanoGPT()
    deep.blocks.extend(copy.deepcopy(deep.blocks[0]) for _ in range(4))
    made = both(monkeypatch, deep.eval())
    assert made.layers is not None and len(deep.blocks) == 6
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert made.traces == 3  # what comes before the layers, a layer, what comes after


class Layer(nn.Module):
    """A layer that does one thing to the stream."""

    def __init__(self, change: Callable[..., Tensor], *arguments: Any) -> None:
        super().__init__()
        self.change, self.arguments = change, arguments
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.norm(x), *self.arguments)


class Stack(nn.Module):
    """A model of such layers; each is also given the stream before the first one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(23, DIM), nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def scaled(x: Tensor, by: Any) -> Tensor:
    return x * by


def divided(x: Tensor, by: Any) -> Tensor:
    return torch.div(x, x.abs() + 1, rounding_mode=by)


@pytest.mark.parametrize(
    ("change", "constants", "distinct"),
    [
        (scaled, [2, 2.0, 2], 2),
        (scaled, [1, True, 1.0], 3),
        (scaled, [0.0, -0.0, 0.0], 2),
        (divided, ["floor", "trunc", "floor"], 2),
    ],
)
def test_layers_that_differ_in_a_constant(
    change: Any, constants: list[Any], distinct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = both(monkeypatch, Stack(*(Layer(change, constant) for constant in constants)).eval())
    assert made.layers is not None
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert made.traces == 1 + distinct  # and the embedding


class Weighted(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize(
    ("other", "distinct"),
    [(torch.eye(DIM), 1), (torch.eye(DIM).double(), 2), (torch.ones(2 * DIM, DIM)[::2], 2)],
    ids=["values", "dtype", "strides"],
)
def test_layers_whose_weights_differ(other: Tensor, distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = torch.ones(DIM, DIM)
    made = both(monkeypatch, Stack(Weighted(alike), Weighted(other), Weighted(alike.clone())).eval())
    assert made.layers is not None
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert made.traces == 1 + distinct


class Tied(nn.Module):
    """Layers that are given the same tensor twice, or two tensors that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, DIM)
        self.mixers = nn.ModuleList(Mixer() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        a, b = self.mixers[0](x, x), self.mixers[1](x, x)
        return self.mixers[2](a, b)


class Mixer(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, -y], -1)[..., ::2]


def test_one_tensor_given_twice_is_not_two_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Tied().eval())
    assert made.layers is not None
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert made.traces == 3  # the embedding, a layer of one tensor, a layer of two


class Carried(nn.Module):
    """Layers are also given something that the one before them made."""

    def __init__(self, start: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.start, self.embed = start, nn.Embedding(23, 2 * DIM)
        self.layers = nn.ModuleList(Step(step) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        other = self.start(x)
        for layer in self.layers:
            x, other = layer(x, other)
        return x + other.sum()


class Step(nn.Module):
    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return self.step(x, other)


def adds(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    other += 1
    return x * 2, other


def adds_to_a_view(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    other[..., :3].mul_(2)
    return x * 2, other


def copies_if_it_must(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Whether `contiguous` gives `other` itself depends on its strides, which those of its base decide."""
    other.mul_(2)
    other.contiguous().add_(1)
    return x * 2, other


def takes_the_place(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    other.set_(x * 2)
    return x * 2, other


def itself(x: Tensor) -> Tensor:
    return x


def half(x: Tensor) -> Tensor:
    return x[..., :DIM]


@pytest.mark.parametrize(
    ("start", "step"),
    [
        (itself, adds),
        (half, adds),
        (half, adds_to_a_view),
        (half, copies_if_it_must),
        (torch.ones_like, takes_the_place),
    ],
)
def test_what_another_layer_made_is_written(start: Any, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Carried(start, step).eval())
    assert made.layers is None and "is written by a layer that did not make it" in made.reason


def sums(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    copy = other.contiguous()
    copy.add_(1)
    fresh = torch.ones_like(x.mT)
    fresh.cumsum_(1)  # eagerly with the strides of `x.mT`; the functional sum has others
    return x * other.mT, fresh


def test_what_a_layer_gives_has_other_strides_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Carried(lambda x: torch.ones_like(x.mT), sums).eval())
    assert made.layers is None and "has other strides in the graph" in made.reason


def keeps_its_own(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    fresh = x * 3
    view = fresh[..., :3]
    view += 1
    return fresh, other + view.sum()


def test_what_a_layer_made_itself_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Carried(itself, keeps_its_own).eval())
    assert made.layers is not None, made.reason
    assert rows(made.layers.graph) == rows(made.whole.graph)
    assert made.traces == 4  # the embedding, a layer with one tensor given twice, one with two, one with the end


@pytest.mark.rare
def test_a_state_that_layers_write(monkeypatch: pytest.MonkeyPatch) -> None:
    example = (torch.arange(9)[None], torch.arange(9)), {"input_pos": "positions"}
    made = both(monkeypatch, CachedDecoder().eval(), *example)
    assert made.layers is None and "is written by a layer that did not make it" in made.reason


def test_less_than_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Stack(Layer(scaled, 2)).eval())
    assert made.layers is None and made.reason == "it has less than two numbered layers"


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (x @ x.transpose(1, 2) @ x).float()


def test_settings_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Stack(Cast(), Cast()).eval())
    assert made.layers is None and "changes a setting" in made.reason
    assert not torch.is_autocast_enabled("cpu")


turns = iter(range(100))


@torch._dynamo.allow_in_graph
def in_turns(x: Tensor) -> Tensor:
    """Does something else each time."""
    return x.sin() if next(turns) % 2 else x.cos()


def test_functions_of_the_users_are_called_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Stack(*(Layer(in_turns) for _ in range(4))).eval())
    assert made.layers is not None and made.traces == 5
    waves = [str(n.target) for n in made.layers.graph.nodes if "sin" in str(n.target) or "cos" in str(n.target)]
    assert len(set(waves)) == 2 and all(a != b for a, b in itertools.pairwise(waves))


class Rows(nn.Module):
    """One row of ones for each token, in the default dtype of the moment."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(x.shape[1], 1).sum().to(x.dtype)


@torch._dynamo.allow_in_graph
def in_other_dtype(x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float32 if torch.get_default_dtype() == torch.float64 else torch.float64)
    return x + 0


def test_a_setting_that_a_function_of_the_users_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        made = both(monkeypatch, Stack(Rows(), Rows(), Layer(in_other_dtype), Rows(), Rows()).eval())
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.layers is not None and made.traces == 4  # the embedding, a layer, the function, a layer again
    ones = [n.meta["val"].dtype for n in made.layers.graph.nodes if "ones" in str(n.target)]
    assert ones[0] == ones[1] != ones[2] == ones[3]


inner = fx.symbolic_trace(lambda x: x * 2 + 1)
for traced in inner.graph.nodes:
    traced.stack_trace = "somewhere else"


@torch._dynamo.allow_in_graph
def with_places_of_its_own(x: Tensor) -> Tensor:
    with fx.traceback.preserve_node_meta():
        return fx.Interpreter(inner).run(x)


def test_a_function_that_sets_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Stack(Layer(with_places_of_its_own), Layer(with_places_of_its_own)).eval())
    assert made.layers is not None
    assert [r[:3] for r in rows(made.layers.graph)] == [r[:3] for r in rows(made.whole.graph)]


def numbered(x: Tensor, number: float) -> Tensor:
    return x * torch.tensor(number)


def test_constant_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(monkeypatch, Stack(Layer(numbered, 2.0), Layer(numbered, 3.0), Layer(numbered, 2.0)).eval())
    assert made.layers is not None, made.reason
    assert rows(made.layers.graph) == rows(made.whole.graph)
    mine, theirs = (
        [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"] for gm in (made.layers, made.whole)
    )
    assert mine == theirs == [2.0, 3.0, 2.0]


def test_layers_without_modules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code between numbered modules belongs to the one before it."""
    made = both(monkeypatch, Tiny())
    assert made.layers is not None
    assert rows(made.layers.graph) == rows(made.whole.graph)
