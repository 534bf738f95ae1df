"""Pass `fuse rope`: every spelling of a rotation is read, what is none is left, and the meaning stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import CONTEXT, DIM, HEADS, VOCAB, RopeTril, Tiny
from oracles import EAGER, assert_decodes
from pass_cases import before, ops
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import treespec_compiler as treespec
from treespec_compiler.ir import attention, registry
from treespec_compiler.ir import ops as ir_ops
from treespec_compiler.ir.library import arguments
from treespec_compiler.ir.verify import problems
from treespec_compiler.passes import bind_kernels, fuse_rope
from treespec_compiler.passes.framework.manager import run_passes
from treespec_compiler.passes.rope.linear import same_value

FORCED = {**EAGER, "pipeline": "default,fuse-rope"}


class Half(Tiny):
    """As in Llama: numbers d and d + D / 2 are a pair, and cos and sin have a column for each number."""

    layers = 1
    rotary = DIM // HEADS

    def setup(self) -> None:
        angles = torch.arange(CONTEXT)[:, None] / 7.0 ** torch.arange(self.rotary // 2)
        self.register_buffer("angles", angles, persistent=False)  # [context, R / 2]

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """x [1, H, T, R], angles [T, R / 2]."""
        every = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * every.cos() + torch.cat([-second, first], -1) * every.sin()

    def turned(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, angles), self.turn(k, angles)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k = self.turned(q, k, self.angles[: q.shape[2]])
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class Products(Half):
    """As in the paper: each half of the result is a sum of two products."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        first, second = x[..., : self.rotary // 2], x[..., self.rotary // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Interleaved(Half):
    """As in GPT-J: numbers 2 d and 2 d + 1 are a pair."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (a.repeat_interleave(2, -1) for a in (angles.cos(), angles.sin()))
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


class Pairs(Half):
    """As in gpt-fast: heads behind tokens, pairs in a dimension of their own, in float32, one table of cos and sin."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        table = torch.stack([angles.cos(), angles.sin()], -1)[None, :, None]  # [1, T, 1, R / 2, 2]
        x = x.transpose(1, 2)
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        cos, sin = table[..., 0], table[..., 1]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.flatten(3).type_as(x).transpose(1, 2)


class Partial(Half):
    """As in GPT-NeoX: the rest of a head is not turned."""

    rotary = 2

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([super().turn(x[..., : self.rotary], angles), x[..., self.rotary :]], -1)


class Unbound(Half):
    """The two halves taken out of a dimension of their own, with the sum the other way round."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        first, second = x.unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack([first * cos - sin * second, sin * first + second * cos], -2).flatten(-2)


SPELLINGS = {
    Half: ("half", 4, 4),
    Products: ("half", 4, 2),
    Interleaved: ("interleaved", 4, 4),
    Pairs: ("interleaved", 4, 2),
    Partial: ("half", 2, 2),
    Unbound: ("half", 4, 2),
}


def fused(model: Any) -> tuple[list[str], list[str], int, Any]:
    """Ops before, ops after, matches."""
    state = before(model, bind_kernels.PASS)
    old = ops(state)
    record = next(iter(run_passes(state, [fuse_rope.PASS])))
    state.clean()
    assert problems(state.graph, state.level) == []
    return old, ops(state), record.matches, state


@pytest.mark.family
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda c: c.__name__)
def test_rotation_joins_attention(spelling: type[Half]) -> None:
    style, rotary, width = SPELLINGS[spelling]
    old, new, matches, state = fused(spelling())
    assert matches == old.count("treespec.tree_attention") == new.count("treespec.tree_attention") == 1
    gone = {"aten.neg", "aten.stack", "aten.sub"} & set(old)
    assert not gone & set(new) or spelling is Pairs  # its table is a stack
    for node in state.graph.nodes:
        if node.target is ir_ops.tree_attention:
            found = arguments(node)
            assert (found["style"], found["rotary"], found["cos"].meta["val"].shape[1]) == (style, rotary, width)
            assert found["sin"].meta["val"].shape == found["cos"].meta["val"].shape
            assert node.meta["site"] == 0


def turning(program: Any) -> int:
    """Sites whose attention rotates."""
    calls = [n for n in program.state.graph.nodes if n.target is ir_ops.tree_attention]
    return sum(arguments(call)["cos"] is not None for call in calls)


@pytest.mark.family
@pytest.mark.parametrize("spelling", [*SPELLINGS, RopeTril], ids=lambda c: c.__name__)
def test_the_meaning_stays(spelling: Any) -> None:
    """The path oracle on the references, with every pass checked on random trees."""
    model = spelling().eval()
    program: Any = treespec.tree_program(model, options={**FORCED, "verify_each": "semantic"})
    assert turning(program) == len(program.sites)
    assert_decodes(model, program, VOCAB, rounds=2)


@pytest.mark.family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_half_precision(dtype: torch.dtype) -> None:
    """Rope read from buffers of the model's dtype: the meaning is checked on random trees."""
    program: Any = treespec.tree_program(RopeTril().eval().to(dtype), options={**FORCED, "verify_each": "semantic"})
    assert turning(program) == 2


def test_a_site_is_fused_once() -> None:
    *_, state = fused(Half())
    assert [record.matches for record in run_passes(state, [fuse_rope.PASS])] == [0]


class Backwards(Half):
    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        every = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * every.cos() + torch.cat([second, -first], -1) * every.sin()


class Queries(Half):
    def turned(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, angles), k


class OtherAngles(Half):
    def turned(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, angles), self.turn(k, angles * 0.5)


class OtherStyle(Half):
    def turned(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, angles), Products.turn(self, k, angles)


class EachHead(Half):
    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        heads = torch.arange(HEADS).view(-1, 1, 1) + 1.0
        return super().turn(x, angles * heads)


class Doubled(Half):
    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        return super().turn(x, angles) * 2


class Added(Half):
    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        return super().turn(x, angles) + x


class Rounded(Half):
    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        return super().turn(x.half(), angles.half()).float()


class ReadTwice(Half):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k = self.turned(q, k, self.angles[: q.shape[2]])
        return scaled_dot_product_attention(q, k, v, is_causal=True) + q


REFUSED = {
    Backwards: "q is no rotation of a known style",
    Queries: "k is no rotation of a known style",
    OtherAngles: "q and k are rotated in different ways",
    OtherStyle: "q and k are rotated in different ways",
    EachHead: "q is no rotation of a known style",
    Doubled: "q is no rotation of a known style",
    Added: "q is no rotation of a known style",
    Rounded: "q is no rotation of a known style",
    ReadTwice: "q has other readers",
    Tiny: "q is no rotation of a known style",
}


@pytest.mark.family
@pytest.mark.parametrize("model", REFUSED, ids=lambda c: c.__name__)
def test_what_is_not_proved_is_left(model: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "treespec.passes")
    old, new, matches, _ = fused(model())
    assert matches == 0 and old == new
    assert caplog.text.count(f"rotation and attention stay apart: {REFUSED[model]}") == model.layers


@pytest.mark.rare
def test_only_where_there_is_a_kernel() -> None:
    """On a CPU the pipeline is the same as without the pass; with a kernel it runs by itself and the op is bound."""
    program: Any = treespec.tree_program(Half(), options=EAGER)
    assert "fuse rope" not in [record.name for record in program.history.records]

    try:
        kernel = registry.register_kernel("tree_attention", attention.reference, name="test", device="cpu")
        model = Half()
        program = treespec.tree_program(model, options=EAGER)
        bound = [n for n in program.state.graph.nodes if n.target is kernel.target]
        assert len(bound) == 1 and arguments(bound[0])["cos"] is not None
        assert next(r.matches for r in program.history.records if r.name == "fuse rope") == 1
    finally:
        registry.unregister_kernel(ir_ops.tree_attention, "test")


def test_same_value() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    aten = torch.ops.aten
    a, b = (graph.call_function(aten.cos.default, (graph.call_function(aten.add.Tensor, (x, 1)),)) for _ in range(2))
    c = graph.call_function(aten.cos.default, (graph.call_function(aten.add.Tensor, (x, 1.0)),))
    d = graph.call_function(aten.cos.default, (graph.call_function(aten.add.Tensor, (y, 1)),))
    assert same_value(a, b) and not same_value(a, c) and not same_value(a, d)
    dice = [graph.call_function(aten.rand_like.default, (x,)) for _ in range(2)]
    assert same_value(dice[0], dice[0]) and not same_value(*dice)
    for _ in range(60):  # each value is read twice: compared once all the same
        a, b = (graph.call_function(aten.add.Tensor, (value, value)) for value in (a, b))
    assert same_value(a, b) and not same_value(a, graph.call_function(aten.add.Tensor, (a, b)))
