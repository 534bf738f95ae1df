"""token locality (no change): outside attention, every op acts on each token alone.

Each node gets the dimension that carries the tokens, or None when no dimension does. An op is accepted only by a rule
that shows where that dimension goes; an op without a rule, or one that reduces, slices, shifts or contracts the token
dimension, is refused by name. This is what allows nodes of different branches, and of different requests, to be packed
side by side in one sequence.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .closed_form import ClosedForms, shape_of
from .manager import Pass
from .positions import position_cut
from .provenance import op_name
from .state import GraphState, refuse
from .token_rules import RULES, Axis, Mixes, rank_of

ABOVE = -1  # index arithmetic above the cut; only other such arithmetic and cut nodes may read it


class TokenAxes:
    """The token dimension of every tensor node; `of` raises the refusal for an op that mixes tokens."""

    def __init__(self, state: GraphState) -> None:
        self.length = state.length
        self.cut = position_cut(state)
        self.forms = ClosedForms(state.gm, state.constants, state.position_inputs, state.tokens)
        self.axes: dict[fx.Node, Axis] = {}
        for node in state.graph.nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                self.axes[node] = self._leaf(state, node)
            elif node.op == "call_function" and has_tensor(node):
                self.axes[node] = self._call(node)

    def _leaf(self, state: GraphState, node: fx.Node) -> Axis:
        if node.name == state.tokens:
            return 1
        if node.name in state.position_inputs:
            return len(shape_of(node)) - 1
        return None

    def _call(self, node: fx.Node) -> Axis:
        if node in self.cut:
            return self._checked(node, self.cut[node].at)
        name = op_name(node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise refuse(f"{name} draws random numbers: the model is not a function of its tokens", node)
        if all(self.axes.get(a) in (None, ABOVE) for a in node.all_input_nodes):
            if not _sized(node, self.length):
                return None
            if self.forms.of(node) is None:
                raise refuse(f"{name} makes a value per token that has no closed form", node)
            return ABOVE
        if any(self.axes.get(a) == ABOVE for a in node.all_input_nodes):
            raise refuse(f"{name} reads index arithmetic that is not a position", node)
        rule = RULES.get(name)
        if rule is None:
            raise refuse(f"{name} is not known to act on each token alone", node, _WAY_OUT)
        try:
            return self._checked(node, rule(node, self))
        except Mixes as error:
            raise refuse(f"{name} mixes tokens: {error}", node, _WAY_OUT) from None

    def _checked(self, node: fx.Node, at: Axis) -> Axis:
        """A rule's claim, against the shape: exactly one dimension depends on the number of tokens, and it is T."""
        value = node.meta["val"]
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            shape = tuple(map(_size, tensor.shape)) if isinstance(tensor, Tensor) else ()
            if [i for i, s in enumerate(shape) if self.length in s.free_symbols] != [at] or shape[
                at or 0
            ] != self.length:
                raise refuse(
                    f"{op_name(node)} gives a tensor of shape {list(shape)}: the number of tokens {self.length} must be "
                    "one whole dimension",
                    node,
                    _WAY_OUT,
                )
        return at


_WAY_OUT = "only attention may move information between tokens; a token mixer of another kind needs its own state"


def has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _sized(node: fx.Node, length: sympy.Symbol) -> bool:
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(length in _size(s).free_symbols for v in values if isinstance(v, Tensor) for s in v.shape)


def _size(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def prove_token_locality(state: GraphState) -> int:
    axes = TokenAxes(state)
    logits = state.logits
    if axes.axes.get(logits) != 1 or rank_of(logits) != 3:
        raise refuse(
            f"the output has shape {list(shape_of(logits))}, expected logits [1, tokens, vocabulary]",
            logits,
            "return logits of every position",
        )
    return sum(a is not None for a in axes.axes.values())


PASS = Pass(
    "token locality",
    prove_token_locality,
    before="classified graph",
    after="unchanged; every op but attention is proved to act on each token alone",
    changes=False,
)
