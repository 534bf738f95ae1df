"""token locality (no change): outside attention, every op acts on each token alone.

Each node gets the dimension that carries the tokens, or None when no dimension does; `routing` knows of more places,
for rows that are sorted by expert. An op is accepted only by a rule that shows where that dimension goes; an op without
a rule, or one that reduces, slices, shifts or contracts the token dimension, is refused by name. This is what allows
nodes of different branches, and of different requests, to be packed side by side in one sequence.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.provenance import op_name

from .forms.closed_form import SHAPE_ONLY, shape_of
from .forms.form import packet
from .forms.positions import position_cut
from .framework.manager import Pass
from .framework.state import GraphState, refuse
from .locality.axes import Mixes, rank_of
from .locality.routing import Routing
from .locality.rows import GroupSizes, Place, Rows, Uniform

ABOVE = -1  # index arithmetic above the cut; only other such arithmetic and cut nodes may read it


class TokenAxes:
    """The place of the tokens in every tensor node; raises the refusal for an op that mixes tokens."""

    def __init__(self, state: GraphState) -> None:
        self.length = state.length
        self.cut = position_cut(state)
        self.forms = state.closed_forms()
        self.axes: dict[fx.Node, Place] = {}
        self.routing = Routing(self.axes, self.length)
        for node in state.graph.nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                self.axes[node] = self._leaf(state, node)
            elif node.op == "call_function" and has_tensor(node):
                self.axes[node] = self._call(node)

    def _leaf(self, state: GraphState, node: fx.Node) -> Place:
        if node.name == state.tokens:
            return 1
        if node.name in state.position_inputs:
            return len(shape_of(node)) - 1
        return None

    def _call(self, node: fx.Node) -> Place:
        if node in self.cut:
            cut = self.cut[node]
            if cut.kind == "constant" and cut.at is not None and shape_of(node)[cut.at] != self.length:
                return self._checked(node, Uniform(cut.at))
            return self._checked(node, cut.at)
        name = op_name(node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise refuse(
                Refusal.TRAINING, f"{name} draws random numbers: the model is not a function of its tokens", node
            )
        if packet(node) in SHAPE_ONLY or all(self.axes.get(a) in (None, ABOVE) for a in node.all_input_nodes):
            if not _sized(node, self.length):
                return None
            if self.forms.of(node) is None:
                raise refuse(Refusal.POSITIONS, f"{name} makes a value per token that has no closed form", node)
            return ABOVE
        if any(self.axes.get(a) == ABOVE for a in node.all_input_nodes):
            raise refuse(Refusal.POSITIONS, f"{name} reads index arithmetic that is not a position", node)
        if node.target is torch.ops.aten.view.dtype and node.args[0].meta["val"].is_floating_point():
            what = "the bits of computed numbers are read, and the last ones depend on the order of sums"
            raise refuse(Refusal.ROUNDING, what, node)
        if _counts_content(node):
            raise refuse(
                Refusal.MIXER, f"{name} gives as many rows as the tokens' content asks for", node, _ROWS_WAY_OUT
            )
        if not self.routing.knows(node):
            raise refuse(Refusal.UNKNOWN_OP, f"{name} is not known to act on each token alone", node, _way_out(name))
        try:
            return self._checked(node, self.routing.place(node))
        except Mixes as error:
            raise refuse(Refusal.MIXER, f"{name} mixes tokens: {error}", node, _WAY_OUT) from None

    def _checked(self, node: fx.Node, place: Place) -> Place:
        """A rule's claim, against the shape: exactly one dimension depends on the number of tokens, as it says."""
        value = node.meta["val"]
        at = place.at if isinstance(place, (Rows, Uniform)) else None if isinstance(place, GroupSizes) else place
        wanted = place.repeats.size(self.length) if isinstance(place, Rows) else self.length
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            shape = tuple(map(_size, tensor.shape)) if isinstance(tensor, Tensor) else ()
            if shape == (0,):
                continue  # a result the op leaves empty
            sized = [i for i, s in enumerate(shape) if self.length in s.free_symbols]
            whole = at is None or isinstance(place, Uniform) or (at < len(shape) and shape[at] == wanted)
            if sized == ([] if at is None else [at]) and whole:
                continue
            raise refuse(
                Refusal.MIXER,
                f"{op_name(node)} gives a tensor of shape {list(shape)}: the number of tokens {self.length} must be "
                "one whole dimension",
                node,
                _WAY_OUT,
            )
        return place


_WAY_OUT = "only attention may move information between tokens; a token mixer of another kind needs its own state"


_ROWS_WAY_OUT = "compute every row and choose with torch.where, or write what was picked back with `out[rows] += ...`"


def _counts_content(node: fx.Node) -> bool:
    """Whether a size of the result is known at run time only."""
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(bool(free_unbacked_symbols(v)) for v in values if isinstance(v, Tensor))


def _way_out(name: str) -> str:
    if name.startswith(("aten.", "treespec.", "prims.")) or "." not in name:
        return _WAY_OUT
    op = name.replace(".", "::")
    return f"if each token is computed on its own, vouch for it: treespec.register_op({op!r}, token_local=True)"


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
            Refusal.CALL,
            f"the output has shape {list(shape_of(logits))}, expected logits [1, tokens, vocabulary]",
            logits,
            "return logits of every position, [1, T, V], or the head of the last one alone, head(x[:, -1:])",
        )
    return sum(a is not None for a in axes.axes.values())


PASS = Pass(
    "token locality",
    prove_token_locality,
    before="classified graph",
    after="unchanged; every op but attention is proved to act on each token alone",
    changes=False,
    needs=("classify",),
)
