"""Writes to a result that is its argument, though functionalization takes them apart, are seen or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from treespec_compiler import Unsupported
from treespec_compiler.capture import capture
from treespec_compiler.capture.call import call_spec

DIM = 8


class Model(nn.Module):
    """Two layers, and an end that a test gives."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor], in_a_layer: bool) -> None:
        super().__init__()
        self.end, self.in_a_layer = end, in_a_layer
        self.embed = nn.Embedding(23, DIM)
        self.layers = nn.ModuleList(Layer(end) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) if self.in_a_layer else layer.linear(x)
        return x if self.in_a_layer else self.end(x, self.embed.weight)


class Layer(nn.Module):
    def __init__(self, end: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.end, self.linear = end, nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.linear(x), self.linear.weight)


def result_written(x: Tensor, weight: Tensor) -> Tensor:
    y = x.type_as(weight)
    y += 1
    return x + y


def argument_written(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.broadcast_tensors(x, torch.ones(1))[0]
    x.mul_(2)
    return x + y


def view_written(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.einsum("bij->bji", x)
    y[:, :3].mul_(2)
    return x + y.mT


def view_of_the_argument_read(x: Tensor, weight: Tensor) -> Tensor:
    half = x[..., : DIM // 2]
    y = x.sum_to_size(x.shape)
    y -= 1
    return torch.cat([half, y[..., DIM // 2 :]], -1)


def only_read(x: Tensor, weight: Tensor) -> Tensor:
    return x + x.type_as(weight)


def argument_not_read_again(x: Tensor, weight: Tensor) -> Tensor:
    y = x.type_as(weight)
    y += 1
    return y


def written_before(x: Tensor, weight: Tensor) -> Tensor:
    x += 1
    return x + x.type_as(weight)


def another_type(x: Tensor, weight: Tensor) -> Tensor:
    y = x.type_as(weight.double())
    y += 1
    return x + y.float()


def plain_views(x: Tensor, weight: Tensor) -> Tensor:
    y, z = x.float().contiguous().chunk(2, -1)
    y += z
    return x * 2


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """What the captured graph gives."""
    with torch.no_grad():
        found = capture.capture(model, call_spec(model))
        inputs = [n.name for n in found.graph.graph.nodes if n.op == "placeholder"]
        return found.graph(*(ids if name == found.tokens else found.weights[name].tensor for name in inputs))[0]


@pytest.mark.parametrize("in_a_layer", [False, True])
@pytest.mark.parametrize("end", [result_written, argument_written, view_written, view_of_the_argument_read])
def test_a_lost_write_is_refused(end: Callable[..., Tensor], in_a_layer: bool) -> None:
    with pytest.raises(Unsupported) as refusal:
        run(Model(end, in_a_layer).eval(), torch.arange(7)[None])
    text = str(refusal.value)
    assert "its result is its argument, and one of them is changed in place while the other is still in use" in text
    assert f"in {end.__name__}: " in text and "change a copy" in text


@pytest.mark.parametrize("in_a_layer", [False, True])
@pytest.mark.parametrize("end", [only_read, argument_not_read_again, written_before, another_type, plain_views])
def test_what_is_not_lost_is_not_refused(end: Callable[..., Tensor], in_a_layer: bool) -> None:
    model, ids = Model(end, in_a_layer).eval(), torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(run(model, ids), model(ids))


class LaterLayer(nn.Module):
    """The first layer writes what only the second one reads under its other name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, DIM)
        self.layers = nn.ModuleList(Layer(result_written) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.layers[0].linear(x)
        z = x.type_as(y)
        z += 1
        return self.layers[1].linear(x) + y + z


def test_a_write_that_a_later_layer_would_see() -> None:
    with pytest.raises(Unsupported, match="its result is its argument"):
        run(LaterLayer().eval(), torch.arange(7)[None])
