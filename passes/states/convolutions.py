"""A causal convolution over the tokens becomes one `treespec::causal_convolution`.

y[t] = bias + sum_j weight[j] x[t + start - padding + j * dilation], where `start` is where the result is cut to T
tokens: tap j reads the token padding - start - j * dilation before t, which is proved to be in no tap behind t. Padding
is that of the convolution, or zeros that are put in front of the tokens. One that reads ahead, or leaves tokens out, is
refused; one of another form is left to token locality, which refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir import ops
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..framework.state import GraphState, refuse

_PADS = ("aten.pad", "aten.constant_pad_nd")
_JOINS = ("aten.cat", "aten.hstack", "aten.concat")


@dataclass(frozen=True)
class _Convolution:
    """A convolution of x [1, C, T], with `padding` zeros in front of the tokens and a kernel of `width`."""

    node: fx.Node
    x: fx.Node
    padding: int
    dilation: int
    width: int


def recognize_convolutions(state: GraphState) -> int:
    matches = 0
    forms = state.closed_forms()
    found = [n for n in state.graph.nodes if op_name(n) == "aten.conv1d" and n in forms.tainted]
    for convolution in [_read(state, forms, node) for node in found]:
        if convolution is not None:
            matches += _rewrite(state, convolution)
    return matches


def _read(state: GraphState, forms: ClosedForms, node: fx.Node) -> _Convolution | None:
    """None: it is not over the tokens, or of a form that is not known."""
    weight = argument(node, "weight")
    x, left = _unpadded(state, forms, argument(node, "input"))
    width = shape_of(weight)[-1]
    shape = shape_of(x)
    if any(n in forms.tainted for n in node.all_input_nodes[1:]) or width == 1 or not width.is_Integer:
        return None
    if len(shape) != 3 or shape[0] != 1 or shape[2] != state.length or not shape[1].is_Integer:
        return None
    stride, dilation = (_only(argument(node, name)) for name in ("stride", "dilation"))
    padding = _padding(node)
    if padding is None:
        return None
    if stride != 1:
        reason = f"a convolution over the tokens with stride {stride}: it gives a value for one token of {stride}"
        raise refuse(Refusal.MIXER, reason, node, "keep a value of every token, stride 1")
    return _Convolution(node, x, left + padding, dilation, int(width))


def _rewrite(state: GraphState, found: _Convolution) -> int:
    """How many causal convolutions it became: one for each cut of its result to T tokens."""
    node, matches = found.node, 0
    if shape_of(node)[2] == state.length:
        site = _site(state, found, 0, node)
        node.replace_all_uses_with(site)
        return 1
    for user in list(node.users):
        start = _cut(state, user)
        if start is not None:
            user.replace_all_uses_with(_site(state, found, start, user))
            state.graph.erase_node(user)
            matches += 1
    return matches


def _cut(state: GraphState, user: fx.Node) -> int | None:
    """Where a slice begins that keeps T tokens."""
    if op_name(user) != "aten.slice" or int(argument(user, "dim")) % 3 != 2 or argument(user, "step") != 1:
        return None
    start = argument(user, "start")
    start = 0 if start is None else start
    whole = shape_of(user)[2] == state.length
    return start if whole and isinstance(start, int) and start >= 0 else None


def _site(state: GraphState, found: _Convolution, start: int, at: fx.Node) -> fx.Node:
    node, lag = found.node, found.padding - start
    ahead = found.dilation * (found.width - 1) - lag
    if ahead > 0:
        raise refuse(
            Refusal.MIXER,
            f"a convolution of width {found.width} over the tokens that looks ahead by {ahead}: its last tap reads the "
            f"token {ahead} behind each",
            node,
            f"pad {found.dilation * (found.width - 1)} zeros in front of the tokens, and cut the result to T from 0",
        )
    weight, bias, groups = argument(node, "weight"), argument(node, "bias"), argument(node, "groups")
    args = (found.x, weight, bias, lag, found.dilation, groups)
    return state.call(ops.causal_convolution, args, like=at)


def _unpadded(state: GraphState, forms: ClosedForms, x: fx.Node) -> tuple[fx.Node, int]:
    """What was padded with zeros in its last dimension, and how many stand in front."""
    if op_name(x) in _PADS:
        pad, value = argument(x, "pad"), argument(x, "value")
        constant = argument(x, "mode", "constant") == "constant"
        if constant and not value and all(isinstance(n, int) and n >= 0 for n in pad) and not any(pad[2:]):
            return x.args[0], pad[0]
    if op_name(x) in _JOINS and int(argument(x, "dim", 0)) % len(shape_of(x)) == len(shape_of(x)) - 1:
        parts: Any = x.args[0]
        if len(parts) == 2 and _zeros(state, forms, parts[0]) and shape_of(parts[0])[-1].is_Integer:
            return parts[1], int(shape_of(parts[0])[-1])
    return x, 0


def _zeros(state: GraphState, forms: ClosedForms, node: fx.Node) -> bool:
    form = None if node in forms.tainted else forms.of(node)
    return form is not None and form.expr == 0


def _padding(node: fx.Node) -> int | None:
    padding = argument(node, "padding")
    return {"valid": 0}.get(padding) if isinstance(padding, str) else _only(padding)


def _only(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
