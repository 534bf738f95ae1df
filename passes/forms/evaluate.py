"""Running the part of a captured graph that depends only on the number of tokens and on constants.

A value over pairs of tokens is asked for at chosen places only: `at(node, index)` reads back through element-wise ops,
views and indexing, with the model's own operators, so that rows of a mask for a million tokens cost as much as those
of a short one. What has no such rule is computed whole, up to a number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from .form import packet, size_of

# Elements of a tensor that is computed whole: 64 MB of int64.
MOST_ELEMENTS = 1 << 23
# Ops that read only the shape, dtype or device of their tensor argument.
SHAPE_ONLY = {"new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like", "full_like", "sym_size"}

Index = tuple[Tensor, ...]


class TooLarge(Exception):
    """A value that is computed whole has too many elements at this number of tokens."""


def cone(node: fx.Node) -> set[fx.Node]:
    """The node and everything it is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def evaluate_for_length(node: fx.Node, tokens: str, constants: Mapping[str, Tensor], gm: fx.GraphModule, n: int) -> Any:
    """The value of `node` for n tokens, by interpreting the nodes it depends on."""
    return Values(gm, tokens, constants, n).whole(node)


class Values:
    """Values of nodes for n tokens, on CPU. Token content is never read: zeros stand in for it."""

    def __init__(self, gm: fx.GraphModule, tokens: str, constants: Mapping[str, Tensor], n: int) -> None:
        self.gm, self.tokens, self.constants, self.n = gm, tokens, constants, n
        self._whole: dict[fx.Node, Any] = {}

    def whole(self, node: fx.Node) -> Any:
        """All of a tensor, or a size."""
        if node not in self._whole:
            self._whole[node] = self._computed(node)
        return self._whole[node]

    def at(self, node: fx.Node, index: Index) -> Tensor:
        """The elements of a tensor at `index`: for each dimension, the places along it."""
        rule = _AT.get(packet(node)) if node.op == "call_function" and node not in self._whole else None
        if rule is not None:
            found = rule(self, node, index)
            if found is not None:
                return found
        value = self.whole(node)
        return value[_outer(index)] if index else value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._size(s) for s in node.meta["val"].shape)

    def argument(self, value: Any) -> Any:
        """Sizes as numbers; tensors as they are."""
        return torch.fx.node.map_arg(value, lambda n: self.whole(n))

    def _size(self, size: Any) -> int:
        expr = size_of(size)
        return int(expr.xreplace(dict.fromkeys(expr.free_symbols, self.n))) if expr.free_symbols else int(expr)

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return getattr(self.gm, str(node.target)).cpu()
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return self._size(value)
        if isinstance(value, Tensor) and math.prod(self.shape(node)) > MOST_ELEMENTS:
            raise TooLarge(node.name)
        take = self._blank if packet(node) in SHAPE_ONLY else self.whole
        first, *rest = node.args or (None,)
        args = [torch.fx.node.map_arg(first, take), *torch.fx.node.map_arg(rest, self.whole)] if node.args else []
        return node.target(*args, **self.keywords(node))

    def keywords(self, node: fx.Node) -> dict[str, Any]:
        kwargs = dict(torch.fx.node.map_arg(node.kwargs, self.whole))
        if "device" in kwargs:  # on CPU, wherever the model lives: on meta there would be no values
            kwargs["device"] = torch.device("cpu")
        return kwargs

    def _blank(self, node: fx.Node) -> Tensor:
        """A tensor of the node's shape and type that takes no memory: its values are not read."""
        return torch.zeros((), dtype=node.meta["val"].dtype).expand(self.shape(node))

    def _placeholder(self, node: fx.Node) -> Tensor:
        if node.name == self.tokens:
            return torch.zeros(1, self.n, dtype=torch.int64)
        if node.name in self.constants:
            return self.constants[node.name].detach().cpu()
        value = node.meta["val"]
        return torch.arange(self.n, dtype=value.dtype).expand(self.shape(node))  # a positions input


def _outer(index: Index) -> tuple[Tensor, ...]:
    """Index tensors for the product of the places along each dimension."""
    rank = len(index)
    return tuple(places.view([-1 if i == d else 1 for i in range(rank)]) for d, places in enumerate(index))


ValueRule = Callable[[Values, fx.Node, Index], Tensor | None]


def _broadcast(values: Values, node: Any, index: Index) -> Any:
    """An operand of an element-wise op, where the result is asked for at `index`."""
    if not isinstance(node, fx.Node):
        return node
    if not isinstance(node.meta.get("val"), Tensor):
        return values.whole(node)
    shape = values.shape(node)
    mine = index[len(index) - len(shape) :]
    zero = torch.zeros(1, dtype=torch.int64)
    return values.at(node, tuple(zero if s == 1 else places for s, places in zip(shape, mine, strict=True)))


def _pointwise(values: Values, node: fx.Node, index: Index) -> Tensor:
    args = [_broadcast(values, a, index) for a in node.args]
    found = node.target(*args, **values.keywords(node))
    return found.expand([len(places) for places in index])


def _blank(values: Values, node: fx.Node, index: Index) -> Tensor | None:
    """A tensor filled with one number."""
    sizes = [len(places) for places in index]
    name, dtype = packet(node), node.meta["val"].dtype
    if name in ("ones", "new_ones", "ones_like"):
        return torch.ones(sizes, dtype=dtype)
    if name in ("zeros", "new_zeros", "zeros_like"):
        return torch.zeros(sizes, dtype=dtype)
    return torch.full(sizes, values.argument(argument(node, "fill_value")), dtype=dtype)


def _moved(order: Callable[[fx.Node, int], list[int]]) -> ValueRule:
    """Dimensions in another order: `order(node, rank)[i]` is where dimension i of the result was."""

    def rule(values: Values, node: fx.Node, index: Index) -> Tensor:
        where = order(node, len(index))
        source: list[Any] = [None] * len(index)
        for new, old in enumerate(where):
            source[old] = index[new]
        return values.at(node.args[0], tuple(source)).permute(where)

    return rule


def _permuted(node: fx.Node, rank: int) -> list[int]:
    return [int(d) % rank for d in node.args[1]]


def _swapped(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if rank > 1:
        i, j = (int(argument(node, name, default)) % rank for name, default in (("dim0", 0), ("dim1", -1)))
        order[i], order[j] = order[j], order[i]
    return order


def _ones_moved(values: Values, node: fx.Node, index: Index) -> Tensor | None:
    """A reshape in which only dimensions of size 1 come or go."""
    source: Any = node.args[0]
    before, after = values.shape(source), values.shape(node)
    if node.target is torch.ops.aten.view.dtype or [s for s in before if s != 1] != [s for s in after if s != 1]:
        return None
    wide = iter([places for places, s in zip(index, after, strict=True) if s != 1])
    zero = torch.zeros(1, dtype=torch.int64)
    inner = values.at(source, tuple(zero if s == 1 else next(wide) for s in before))
    sizes = [1 if s == 1 else len(places) for s, places in zip(after, index, strict=True)]
    return inner.reshape(sizes).expand([len(places) for places in index])


def _expand(values: Values, node: fx.Node, index: Index) -> Tensor:
    return _broadcast(values, node.args[0], index).expand([len(places) for places in index])


def _slice(values: Values, node: fx.Node, index: Index) -> Tensor:
    args = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    source: Any = args[0]
    dim, start, step = int(args[1]) % len(index), values.argument(args[2]) or 0, int(args[4])
    size = values.shape(source)[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    return values.at(source, (*index[:dim], start + step * index[dim], *index[dim + 1 :]))


def _select(values: Values, node: fx.Node, index: Index) -> Tensor:
    source: Any = node.args[0]
    shape = values.shape(source)
    dim, place = int(node.args[1]) % len(shape), int(values.argument(node.args[2]))
    picked = torch.tensor([place % shape[dim]])
    return values.at(source, (*index[:dim], picked, *index[dim:])).squeeze(dim)


def _triangle(lower: bool) -> ValueRule:
    def rule(values: Values, node: fx.Node, index: Index) -> Tensor:
        diagonal = values.argument(argument(node, "diagonal"))
        gap = index[-1][None, :] - index[-2][:, None]
        kept = gap <= diagonal if lower else gap >= diagonal
        source = values.at(node.args[0], index)
        return torch.where(kept, source, torch.zeros((), dtype=source.dtype))

    return rule


def _table(values: Values, node: fx.Node, index: Index) -> Tensor | None:
    """A constant read at computed places: `table[i, j]`, an embedding."""
    if op_name(node) == "aten.embedding":
        source, indices = node.args[0], [node.args[1]]
    else:
        source, indices = node.args[0], list(node.args[1])
    used = [i for i, x in enumerate(indices) if x is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    table, first = values.whole(source), used[0]
    rank = len(index) - (table.dim() - len(used))
    mine = index[first : first + rank]
    places = [_broadcast(values, indices[i], mine) for i in used]
    if any(x.dtype is torch.bool for x in places):
        return None
    sizes = [len(p) for p in mine]
    others = iter((*index[:first], *index[first + rank :]))
    for d in range(table.dim()):
        if d not in used:
            table = table.index_select(d, next(others))
    picked = [x.expand(sizes) for x in places]
    return table[(*[slice(None)] * first, *picked)]


def _pad(values: Values, node: fx.Node, index: Index) -> Tensor | None:
    """Constants around the last dimensions."""
    source: Any = node.args[0]
    widths = values.argument(node.args[1])
    plain = packet(node) == "constant_pad_nd"
    if not plain and argument(node, "mode") != "constant":
        return None
    value = argument(node, "value")
    shape, mine = values.shape(source), list(index)
    inside = torch.ones([1] * len(index), dtype=torch.bool)
    for i in range(len(widths) // 2):
        at = len(index) - 1 - i
        place = index[at] - widths[2 * i]
        kept = (place >= 0) & (place < shape[at])
        inside = inside & kept.view([-1 if d == at else 1 for d in range(len(index))])
        mine[at] = place.clamp(0, max(shape[at] - 1, 0))
    found = values.at(source, tuple(mine))
    return torch.where(inside, found, torch.tensor(0 if value is None else value, dtype=found.dtype))


def _cat(values: Values, node: fx.Node, index: Index) -> Tensor:
    """Tensors one after the other."""
    dim, start = int(argument(node, "dim")) % len(index), 0
    result: Tensor | None = None
    for part in node.args[0]:
        size = values.shape(part)[dim]
        place = index[dim] - start
        start += size
        if size == 0:
            continue
        found = values.at(part, (*index[:dim], place.clamp(0, size - 1), *index[dim + 1 :]))
        kept = (place >= 0).view([-1 if d == dim else 1 for d in range(len(index))])
        result = found if result is None else torch.where(kept, found, result)
    assert result is not None
    return result


def _written(values: Values, node: fx.Node, index: Index) -> Tensor | None:
    """A tensor of which a part was written anew: `m[:, :4] = 1`."""
    base, new = node.args[:2]
    dim, size = int(argument(node, "dim")) % len(index), values.shape(node)[int(argument(node, "dim"))]
    if packet(node) == "select_scatter":
        start = int(values.argument(argument(node, "index"))) % size
        stop = start + 1
    else:
        start, stop = (values.argument(argument(node, name)) for name in ("start", "end"))
        start, stop, _ = slice(start, stop).indices(size)
        if argument(node, "step") != 1:
            return None
    place = index[dim] - start
    inside = ((place >= 0) & (index[dim] < stop)).view([-1 if d == dim else 1 for d in range(len(index))])
    old = values.at(base, index)
    if stop <= start:
        return old
    mine = () if packet(node) == "select_scatter" else (place.clamp(0, stop - start - 1),)
    found = values.at(new, (*index[:dim], *mine, *index[dim + 1 :]))
    return torch.where(inside, found if mine else found.unsqueeze(dim), old)


def _index_select(values: Values, node: fx.Node, index: Index) -> Tensor:
    dim = int(node.args[1]) % len(index)
    places = values.at(node.args[2], (index[dim],)).long()
    return values.at(node.args[0], (*index[:dim], places, *index[dim + 1 :]))


_ELEMENTWISE = (
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "neg", "abs", "sign",
    "minimum", "maximum", "clamp", "clamp_min", "clamp_max", "eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__",
    "__xor__", "fill", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__lshift__", "__rshift__",
    "bitwise_left_shift", "bitwise_right_shift", "logical_and", "logical_or", "logical_xor", "logical_not", "where",
    "masked_fill", "_to_copy", "to", "clone", "detach", "alias", "contiguous", "lift_fresh_copy", "pow", "exp", "exp2",
    "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "floor", "ceil", "round", "trunc", "frac",
    "reciprocal", "sin", "cos", "tan", "tanh", "sigmoid", "relu", "isinf", "isnan", "isfinite", "nan_to_num",
)  # fmt: skip

_AT: dict[str, ValueRule] = dict.fromkeys(_ELEMENTWISE, _pointwise) | {
    "ones": _blank, "zeros": _blank, "full": _blank, "new_ones": _blank, "new_zeros": _blank, "new_full": _blank,
    "ones_like": _blank, "zeros_like": _blank, "full_like": _blank,
    "permute": _moved(_permuted), "transpose": _moved(_swapped), "t": _moved(_swapped),
    "unsqueeze": _ones_moved, "squeeze": _ones_moved, "view": _ones_moved, "reshape": _ones_moved,
    "_unsafe_view": _ones_moved, "expand": _expand, "slice": _slice, "select": _select,
    "pad": _pad, "constant_pad_nd": _pad, "cat": _cat,
    "slice_scatter": _written, "select_scatter": _written,
    "tril": _triangle(lower=True), "triu": _triangle(lower=False),
    "embedding": _table, "index": _table, "index_select": _index_select,
}  # fmt: skip
