"""Values with a dimension of cache cells, computed again for the cells of the new tokens only.

Starting at the contents of a cache, each op must act on each cell alone (the rules of `token_rules`, with cells in the
place of tokens), until attention adds up over them: scaled_dot_product_attention, or softmax and a product with V.
Any other use of a cell is refused.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, axis, shape_of
from ..framework.state import GraphState, refuse
from ..locality.axes import Axis, Mixes, rank_of
from ..locality.token_rules import RULES
from ..locality.token_writes import WRITES
from .spelled_out import SOFTMAXES

aten = torch.ops.aten

_ATTENTION = "aten.scaled_dot_product_attention"
_PRODUCTS = ("aten.matmul", "aten.bmm")
_SIZED = ("aten.reshape", "aten.expand")  # the sizes of the result are argument 1
_WAY_OUT = "a cache may be read by attention only, under a mask that hides the cells after the query's own"


class Cells:
    """Where the cells are in every value, and the value with only the first T of them."""

    def __init__(self, state: GraphState, forms: ClosedForms) -> None:
        self.state, self.forms = state, forms
        self.axes: dict[fx.Node, Axis] = {}
        self.length: sympy.Expr = sympy.Integer(0)  # cells of the op at hand, for the rules
        self._new: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[fx.Node, int] = {}
        self._masks: dict[tuple[fx.Node, int], fx.Node] = {}
        first = next(n for n in state.graph.nodes if n.op == "call_function")
        self.tokens: Any = state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=first)

    def replace(self, node: fx.Node, value: fx.Node, at: int, cells: int) -> None:
        """`node` has `cells` cells in dimension `at`; `value` is it for the first T."""
        self.axes[node], self._new[node], self._sizes[node] = at, value, cells

    def follow(self) -> None:
        """Rewrite everything that is computed from cells; raises the refusal for a use other than attention."""
        for node in list(self.state.graph.nodes):
            if node in self._new:
                continue
            self.axes[node] = None
            carried = [a for a in node.all_input_nodes if self.axes.get(a) is not None]
            if not carried or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                if carried:
                    raise self._elsewhere(node)
                continue
            sizes = {self._sizes[a] for a in carried}
            if len(sizes) != 1:
                raise refuse(Refusal.STATE, f"caches of different lengths {sorted(sizes)} meet", node, _WAY_OUT)
            self._rewrite(node, sizes.pop())

    def _elsewhere(self, node: fx.Node, why: str = "") -> Exception:
        text = f"the model's own cache is read by {op_name(node)}, outside attention"
        return refuse(Refusal.STATE, f"{text}: {why}" if why else text, node, _WAY_OUT)

    def _rewrite(self, node: fx.Node, size: int) -> None:
        self.length = sympy.Integer(size)
        name = op_name(node)
        if name == _ATTENTION:
            return self._finish(node, self._attention(node, size))
        if name in _PRODUCTS and self._adds_up(node):
            return self._finish(node, self._again(node, node.args))
        if name == "aten.slice" and self._is_written_part(node):
            return self._finish(node, self._new[node.args[0]])
        rule = WRITES.get(name) or RULES.get(name)
        if rule is None:
            raise self._elsewhere(node)
        try:
            at = self.axes[node.args[0]] if self._is_softmax(node) else rule(node, self)
        except Mixes as error:
            raise self._elsewhere(node, str(error)) from None
        args = self._arguments(node, at, size)
        self.replace(node, self._checked(node, self._again(node, args), at), at or 0, size)

    def _finish(self, node: fx.Node, new: fx.Node) -> None:
        """The op added up over the cells, or cut them down to those of the tokens: its result has none."""
        if shape_of(new) != shape_of(node):
            raise self._elsewhere(node, f"its shape {list(shape_of(node))} becomes {list(shape_of(new))}")
        node.replace_all_uses_with(new)
        self.state.graph.erase_node(node)  # NOTE dead-code elimination keeps attention: it may draw random numbers
        self.axes[new] = None

    def _again(self, node: fx.Node, args: Any) -> fx.Node:
        """The op on the values with fewer cells."""
        mapped = fx.node.map_arg((tuple(args), node.kwargs), lambda a: self._new.get(a, a))
        try:
            return self.state.call(node.target, tuple(mapped[0]), dict(mapped[1]), like=node)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._elsewhere(node, str(error).splitlines()[0]) from error

    def _checked(self, node: fx.Node, new: fx.Node, at: Axis) -> fx.Node:
        """The shape must be the old one with T in place of the cells, in every part of the result."""
        before, after = node.meta["val"], new.meta["val"]
        pairs = zip(before, after, strict=True) if isinstance(before, (tuple, list)) else [(before, after)]
        for old, made in pairs:
            wanted = [self.tokens.meta["val"] if i == at else s for i, s in enumerate(old.shape)]
            if list(made.shape) != wanted:
                raise self._elsewhere(node, f"its shape {list(old.shape)} becomes {list(made.shape)}")
        return new

    def _arguments(self, node: fx.Node, at: Axis, size: int) -> Any:
        """Sizes that count cells count tokens; a mask or bias over all cells is cut to the first T."""
        assert at is not None
        args: list[Any] = list(node.args)
        if op_name(node) in _SIZED:
            args[1] = [self.tokens if i == at else s for i, s in enumerate(args[1])]
            return args
        if RULES.get(op_name(node)) is not RULES["aten.add"]:  # only element by element do sizes stand over each other
            return args
        for i, operand in enumerate(args):
            if isinstance(operand, fx.Node) and self.axes.get(operand) is None and _is_tensor(operand):
                dim = at - (rank_of(node) - rank_of(operand))
                if dim >= 0 and dim < rank_of(operand) and shape_of(operand)[dim] == size:
                    args[i] = self._cut(operand, dim, size, node)
        return args

    def _cut(self, mask: fx.Node, dim: int, size: int, reader: fx.Node) -> fx.Node:
        """mask[.., :T, ..] for a mask over all cells."""
        if (mask, dim) not in self._masks:
            self._reaches_the_end(mask, size, reader)
            cut = self.state.call(aten.slice.Tensor, (mask, dim, 0, self.tokens), like=reader)
            if shape_of(cut)[dim] != self.state.length:
                raise refuse(
                    Refusal.SPECIALISED,
                    f"the example tokens fill the model's own cache of {size}: the trace specialised it",
                    reader,
                )
            self._masks[mask, dim], self.axes[cut] = cut, None
        return self._masks[mask, dim]

    def _reaches_the_end(self, mask: fx.Node, size: int, reader: fx.Node) -> None:
        """A table in the mask must have as many rows and columns as there are cells.

        `classify` decides a table on the square of its rows and columns; cells outside it would not be looked at.
        """
        form = self.forms.of(mask)
        if form is None:
            return  # classify refuses it, and names the op
        places = {axis(i) for i, s in enumerate(form.shape) if s == size or s == self.state.length}
        for read in form.tables:
            for extent, index in zip(self.forms.tables[str(read.func)].shape, read.args, strict=True):
                for symbol in index.free_symbols & places:
                    if int(extent) - sympy.expand(index - symbol) < size:
                        raise refuse(
                            Refusal.STATE,
                            f"the mask is read from a table of {extent} entries for a cache of {size} cells: nothing "
                            "shows that the later cells are hidden",
                            reader,
                            _WAY_OUT,
                        )

    def _attention(self, node: fx.Node, size: int) -> fx.Node:
        q, k, v = node.args[:3]
        mask, is_causal = argument(node, "attn_mask"), argument(node, "is_causal")
        for operand in (k, v):
            if self.axes.get(operand) != rank_of(operand) - 2:
                raise self._elsewhere(node, "keys and values must both come from the cache, cells in dimension 2")
        if self.axes.get(q) is not None or (mask is not None and self.axes.get(mask) is not None):
            raise self._elsewhere(node, "the query or the mask is computed from the cache")
        if mask is None or is_causal:
            what = "is_causal=True" if is_causal else "no mask"
            raise refuse(
                Refusal.STATE,
                f"attention reads the whole cache with {what}: cells that no token has written are not hidden by "
                "position",
                node,
                _WAY_OUT,
            )
        last = rank_of(mask) - 1
        cut = self._cut(mask, last, size, node) if shape_of(mask)[last] == size else mask
        args = [cut if a is mask else a for a in node.args]
        kwargs = {name: cut if a is mask else a for name, a in node.kwargs.items()}
        mapped = fx.node.map_arg((tuple(args), kwargs), lambda a: self._new.get(a, a))
        return self.state.call(node.target, tuple(mapped[0]), dict(mapped[1]), like=node)

    def _adds_up(self, node: fx.Node) -> bool:
        """weights [.., T, cells] @ V [.., cells, D]."""
        a, b = node.args[:2]
        return (
            rank_of(a) >= 2
            and rank_of(b) >= 2
            and self.axes.get(a) == rank_of(a) - 1
            and self.axes.get(b) == rank_of(b) - 2
        )

    def _is_softmax(self, node: fx.Node) -> bool:
        """Softmax over the cells: what is hidden has no part in it."""
        at: Any = self.axes[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else None
        return op_name(node) in SOFTMAXES and at is not None and int(node.args[1]) % rank_of(node.args[0]) == at

    def _is_written_part(self, node: fx.Node) -> bool:
        """cache[.., :T, ..]: the cells that were written just now."""
        args = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
        source, dim, start, end, step = args
        length = end.meta["val"].node.expr if isinstance(end, fx.Node) else end
        at = self.axes.get(source)
        return (
            at is not None
            and int(dim) % rank_of(source) == at
            and start in (0, None)
            and (length == self.state.length and step == 1)
        )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
