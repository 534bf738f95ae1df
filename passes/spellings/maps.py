"""`torch.vmap` written out: the function's ops over all its calls at once, which a leading dimension holds.

A value of the function that depends on what is mapped gets that dimension in front; each op has a rule that says what
it is then. A rule is exact: one call's result is the slice of the whole. Where an op has none the model is refused.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument, fill
from treespec_compiler.ir.mapping import mapped, unmapped
from treespec_compiler.ir.provenance import op_name

from ..framework.state import GraphState, refuse
from ..locality.token_rules import RULES as LOCAL

aten = torch.ops.aten


def write_out_maps(state: GraphState) -> int:
    """Write every map of the graph out; returns how many values were mapped. Raises `Unsupported`."""
    found = [n for n in state.graph.nodes if n.target is mapped]
    for level in sorted({int(n.args[2]) for n in found}):  # what is inside of a map is mapped by that one first
        _Map(state, level).write_out()
    if found:
        state.graph.eliminate_dead_code()
        state.gm.recompile()
    return len(found)


class _Map:
    """One level of maps: which nodes depend on what is mapped, and the nodes that hold all calls of each."""

    def __init__(self, state: GraphState, level: int) -> None:
        self.state, self.level = state, level
        self.whole: dict[fx.Node, fx.Node] = {}
        self.at: fx.Node

    def write_out(self) -> None:
        for node in list(self.state.graph.nodes):
            if node.op != "call_function":
                continue
            self.at = node
            if node.target is mapped and node.args[2] == self.level:
                self.whole[node] = self.moved(node.args[0], int(node.args[1]), 0)
            elif node.target is unmapped and node.args[1] == self.level:
                node.replace_all_uses_with(self._together(node))
            elif any(a in self.whole for a in node.all_input_nodes):
                fill(node)
                self.whole[node] = self._ruled(node)

    def _together(self, node: fx.Node) -> fx.Node:
        """All results of a map, in the dimension that it has them in."""
        x, _, size, dim = node.args
        if x in self.whole:
            return self.moved(self.whole[x], 0, int(dim))
        wide = self.emit(aten.unsqueeze.default, x, dim)
        sizes = [size if i == dim else -1 for i in range(_rank(wide))]
        return self.emit(aten.expand.default, wide, sizes)

    def _ruled(self, node: fx.Node) -> fx.Node:
        name = op_name(node)
        rule = _RULES.get(name) or (_pointwise if LOCAL.get(name) is LOCAL["aten.add"] else None)
        try:
            new = None if rule is None else rule(self, node)
        except (IndexError, RuntimeError, TypeError, ValueError):  # such as a number of each call where one is wanted
            new = None
        if new is None or not _is_whole(node, new):
            raise refuse(
                Refusal.MIXER,
                f"torch.vmap maps a function over a dimension in which {node.target} has no rule",
                node,
                "write the dimension out: give the function's operands one more dimension and call it once",
            )
        return new

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.state.call(target, args, kwargs, like=self.at)

    def moved(self, x: Any, dim: int, to: int) -> fx.Node:
        """`x` with a dimension at another place, the others in their order."""
        if dim == to:
            return x
        order = [i for i in range(_rank(x)) if i != dim]
        order.insert(to, dim)
        return self.emit(aten.permute.default, x, order)

    def wide(self, x: Any, rank: int) -> Any:
        """All calls of an operand that has `rank` dimensions in one of them, sizes of 1 in front of its own."""
        if x not in self.whole:
            return x
        found = self.whole[x]
        for _ in range(rank - _rank(x)):
            found = self.emit(aten.unsqueeze.default, found, 1)
        return found

    def every(self, x: Any, size: Any) -> Any:
        """All calls of an operand, where it is the same in each, too."""
        if x in self.whole:
            return self.whole[x]
        return self.emit(aten.expand.default, self.emit(aten.unsqueeze.default, x, 0), [size, *[-1] * _rank(x)])

    def size(self) -> Any:
        """How many calls there are."""
        first = next(self.whole[a] for a in self.at.all_input_nodes if a in self.whole)
        value: Any = first.meta["val"]
        value = value[0] if isinstance(value, (list, tuple)) else value
        if isinstance(value.shape[0], int):
            return value.shape[0]
        return self.emit(aten.sym_size.int, first, 0)


def _is_whole(node: fx.Node, new: fx.Node) -> bool:
    """Whether all calls' values have the shape and type of one call's behind one more dimension."""
    one, every = node.meta["val"], new.meta["val"]
    pairs = zip(one, every, strict=True) if isinstance(one, (list, tuple)) else [(one, every)]
    return all(
        not isinstance(a, torch.Tensor)
        or (a.dtype == b.dtype and b.dim() == a.dim() + 1 and [*map(str, a.shape)] == [*map(str, b.shape)][1:])
        for a, b in pairs
    )


def _rank(x: Any) -> int:
    rank: int = x.meta["val"].dim()
    return rank


def _behind(dim: Any, rank: int) -> int:
    """A dimension of one call, in all of them."""
    return int(dim) % max(rank, 1) + 1


_Rule = Callable[[_Map, fx.Node], "fx.Node | None"]


def _pointwise(map_: _Map, node: fx.Node) -> fx.Node:
    rank = _rank(node)
    args = fx.node.map_arg(node.args, lambda a: map_.wide(a, rank))
    kwargs = fx.node.map_arg(node.kwargs, lambda a: map_.wide(a, rank))
    return map_.emit(node.target, *args, **kwargs)


def _same(map_: _Map, node: fx.Node) -> fx.Node | None:
    """An op on the last dimensions of its first operand alone."""
    if any(a in map_.whole for a in node.all_input_nodes if a is not node.args[0]):
        return None
    return map_.emit(node.target, map_.whole[node.args[0]], *node.args[1:], **node.kwargs)


def _along(name: str) -> _Rule:
    """An op along dimensions that it names."""

    def rule(map_: _Map, node: fx.Node) -> fx.Node | None:
        source: Any = node.args[0]
        if [a for a in node.all_input_nodes if a in map_.whole] != [source]:
            return None
        rank = source.meta["val"].dim()
        names = [a.name for a in node.target._schema.arguments]
        dims = argument(node, name) if name in names else None
        if dims is None or dims == []:
            return None
        moved = [_behind(d, rank) for d in dims] if isinstance(dims, (list, tuple)) else _behind(dims, rank)
        args, kwargs = list(node.args), dict(node.kwargs)
        if names.index(name) < len(args):
            args[names.index(name)] = moved
        else:
            kwargs[name] = moved
        return map_.emit(node.target, map_.whole[source], *args[1:], **kwargs)

    return rule


def _reduced(overload: Any) -> _Rule:
    """A sum or mean along dimensions, or of all that one call has."""
    named = _along("dim")

    def rule(map_: _Map, node: fx.Node) -> fx.Node | None:
        if node.target is overload:
            return named(map_, node)
        source: Any = node.args[0]
        dims = list(range(1, _rank(source) + 1))
        # NOTE no dimensions would be all of them
        return map_.emit(overload, map_.whole[source], dims, **node.kwargs) if dims else None

    return rule


def _matmul(map_: _Map, node: fx.Node) -> fx.Node | None:
    """matmul, mm and bmm of matrices: dimensions in front of them are broadcast."""
    a, b = node.args[:2]
    if _rank(a) < 2 or _rank(b) < 2:
        return None
    return map_.emit(aten.matmul.default, map_.wide(a, _rank(node)), map_.wide(b, _rank(node)))


def _linear(map_: _Map, node: fx.Node) -> fx.Node | None:
    x, weight, bias = argument(node, "input"), argument(node, "weight"), argument(node, "bias")
    if weight not in map_.whole and bias not in map_.whole:
        return map_.emit(node.target, map_.whole[x], weight, bias)
    if _rank(x) < 2:
        return None
    turned = map_.emit(aten.transpose.int, map_.wide(weight, _rank(x)), -1, -2)
    made = map_.emit(aten.matmul.default, map_.wide(x, _rank(x)), turned)
    return made if bias is None else map_.emit(aten.add.Tensor, made, map_.wide(bias, _rank(x)))


def _turned(map_: _Map, node: fx.Node) -> fx.Node | None:
    """t, numpy_T and mT of a matrix."""
    x = node.args[0]
    if op_name(node) != "aten.mT" and _rank(x) != 2:
        return None
    return map_.emit(aten.transpose.int, map_.whole[x], -1, -2)


def _transpose(map_: _Map, node: fx.Node) -> fx.Node:
    x, a, b = node.args[:3]
    return map_.emit(aten.transpose.int, map_.whole[x], _behind(a, _rank(x)), _behind(b, _rank(x)))


def _permute(map_: _Map, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    dims: Any = node.args[1]
    return map_.emit(aten.permute.default, map_.whole[x], [0, *(_behind(d, _rank(x)) for d in dims)])


def _reshape(map_: _Map, node: fx.Node) -> fx.Node | None:
    if node.target is aten.view.dtype:
        return None
    sizes: Any = node.args[1]
    return map_.emit(aten.reshape.default, map_.whole[node.args[0]], [map_.size(), *sizes])


def _flatten(map_: _Map, node: fx.Node) -> fx.Node:
    x = node.args[0]
    start, end = (_behind(argument(node, name), _rank(x)) for name in ("start_dim", "end_dim"))
    return map_.emit(node.target, map_.whole[x], start, end)


def _unsqueeze(map_: _Map, node: fx.Node) -> fx.Node:
    return map_.emit(node.target, map_.whole[node.args[0]], _behind(node.args[1], _rank(node)))


def _expand(map_: _Map, node: fx.Node) -> fx.Node:
    sizes: Any = node.args[1]
    return map_.emit(node.target, map_.wide(node.args[0], _rank(node)), [map_.size(), *sizes])


def _joined(map_: _Map, node: fx.Node) -> fx.Node:
    parts: Any = node.args[0]
    size = map_.size()
    stack = op_name(node) == "aten.stack"
    dim = _behind(argument(node, "dim"), _rank(parts[0]) + stack)
    return map_.emit(node.target, [map_.every(p, size) for p in parts], dim)


def _getitem(map_: _Map, node: fx.Node) -> fx.Node:
    new = map_.state.graph
    with new.inserting_before(node):
        made = new.call_function(operator.getitem, (map_.whole[node.args[0]], node.args[1]))
    made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    made.meta["val"] = map_.whole[node.args[0]].meta["val"][node.args[1]]
    return made


def _attention(map_: _Map, node: fx.Node) -> fx.Node | None:
    """scaled_dot_product_attention: what is in front of its matrices is a batch of them."""
    size = map_.size()
    given = [argument(node, a.name) for a in node.target._schema.arguments if not a.kwarg_only]
    q, k, v, mask = given[:4]
    if mask in map_.whole and _rank(mask) != _rank(q):
        return None
    operands = [map_.every(x, size) for x in (q, k, v)]
    return map_.emit(node.target, *operands, map_.whole.get(mask, mask), *given[4:], **node.kwargs)


def _einsum(map_: _Map, node: fx.Node) -> fx.Node | None:
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    if "->" not in equation or "." in equation:
        return None
    left, right = equation.split("->")
    letter = next(c for c in string.ascii_letters if c not in equation)
    parts = left.split(",")
    terms = [letter + p if x in map_.whole else p for p, x in zip(parts, operands, strict=True)]
    whole = [map_.whole.get(x, x) for x in operands]
    return map_.emit(node.target, f"{','.join(terms)}->{letter}{right}", whole)


def _embedding(map_: _Map, node: fx.Node) -> fx.Node | None:
    weight, index = node.args[:2]
    return None if weight in map_.whole else map_.emit(node.target, weight, map_.whole[index])


def _inner(map_: _Map, node: fx.Node) -> fx.Node:
    """The beginning or the end of a map inside of this one."""
    if node.target is mapped:
        x, dim, level = node.args
        return map_.emit(mapped, map_.whole[x], int(dim) + 1, level)
    x, level, size, dim = node.args
    return map_.emit(unmapped, map_.whole[x], level, size, int(dim) + 1)


def _length(map_: _Map, node: fx.Node) -> fx.Node:
    x = node.args[0]
    return map_.emit(aten.sym_size.int, map_.whole[x], _behind(node.args[1], _rank(x)))


_ALONG = (
    "softmax", "log_softmax", "amax", "amin", "var", "std", "logsumexp", "cumsum", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "squeeze", "glu", "linalg_vector_norm",
)  # fmt: skip
_KEPT = (
    "tril", "triu", "layer_norm", "rms_norm", "clone", "contiguous", "detach", "alias", "dropout", "lift_fresh_copy",
    "_to_copy", "to",
)  # fmt: skip

_RULES: dict[str, _Rule] = (
    dict.fromkeys(("treespec.mapped", "treespec.unmapped"), _inner)
    | dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm"), _matmul)
    | dict.fromkeys(("aten.t", "aten.numpy_T", "aten.mT"), _turned)
    | dict.fromkeys(("aten.view", "aten.reshape", "aten._unsafe_view"), _reshape)
    | dict.fromkeys(("aten.cat", "aten.stack"), _joined)
    | {f"aten.{name}": _along("dim") for name in _ALONG}
    | {f"aten.{name}": _same for name in _KEPT}
    | {
        "aten.sum": _reduced(aten.sum.dim_IntList),
        "aten.mean": _reduced(aten.mean.dim),
        "aten.linear": _linear,
        "aten.transpose": _transpose,
        "aten.permute": _permute,
        "aten.flatten": _flatten,
        "aten.unsqueeze": _unsqueeze,
        "aten.expand": _expand,
        "aten.scaled_dot_product_attention": _attention,
        "aten.einsum": _einsum,
        "aten.embedding": _embedding,
        "aten.sym_size": _length,
        "getitem": _getitem,
    }
)
