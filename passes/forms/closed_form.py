"""Closed forms of index tensors, by abstract interpretation with sympy.

A tensor whose elements depend only on where they stand has a closed form: a sympy expression over axis symbols
a0, a1, ... (one per dimension) and the number of tokens. `arange(T)` is `a0`; `m[None] <= n[:, None]` is `a1 <= a0`.
Constant buffers enter as uninterpreted functions ("tables") whose values are at hand. Anything that depends on token
content, or that no rule here covers, has no closed form (None): nothing is guessed.

Size-1 axes never occur in a form: their only index is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.private_torch import FakeTensor
from treespec_compiler.ir.provenance import op_name

from .bounds import decided
from .call import OpCall
from .evaluate import SHAPE_ONLY, TooLarge, cone, evaluate_for_length
from .form import BY_PLACE, Form, Shape, axis, broadcast, number, packet, shape_of, shape_of_tensor, size_of
from .logic import LOGIC_RULES
from .rules import RULES
from .sequences import SEQUENCE_RULES

__all__ = ["BY_PLACE", "SHAPE_ONLY", "ClosedForms", "Form", "Shape", "axis", "broadcast", "number", "shape_of"]


LONGEST_TABLE = 2048


class ClosedForms:
    """Lazily evaluated closed forms for the nodes of one graph.

    `constants` maps placeholder and attribute names to their tensors; `positions` names placeholders that carry
    0..T-1; `tainted` nodes depend on token content.
    """

    def __init__(
        self, gm: fx.GraphModule, constants: Mapping[str, Tensor], positions: Sequence[str] = (), tokens: str = ""
    ) -> None:
        self.gm = gm
        self.constants = constants
        self.positions = set(positions)
        self.tokens = tokens
        self.tables: dict[str, Tensor] = {}
        self.read: set[str] = set()  # constants whose values were used
        self.numbers: set[str] = set()  # those of them that became numbers in a form, or were looked into (`values`)
        self._behind: dict[str, set[str]] = {}  # the constants that a table was computed from
        self._memo: dict[fx.Node, Form | None] = {}
        self.tainted = _content_dependent(gm, tokens)
        self.counting = _length_dependent(gm, tokens, self.positions)

    def of(self, node: fx.Node) -> Form | None:
        if node not in self._memo:
            self._memo[node] = None if node in self.tainted else self._evaluate(node)
        return self._memo[node]

    def values(self, table: str) -> Tensor:
        """What is in a table, for a proof: it is made again when a constant behind the table changes."""
        self.numbers |= self._behind[table]
        return self.tables[table]

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor behind a weight or attribute node."""
        if node.op == "placeholder":
            return self.constants.get(node.name)
        if node.op == "get_attr":
            value = getattr(self.gm, str(node.target), None)
            return value if isinstance(value, Tensor) else None
        return None

    def _evaluate(self, node: fx.Node) -> Form | None:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return Form(size_of(value), ())
        if node.op in ("placeholder", "get_attr"):
            return self._leaf(node)
        if node.op != "call_function" or not isinstance(value, Tensor):
            return None
        rule = LOGIC_RULES.get(op_name(node)) or RULES.get(op_name(node)) or SEQUENCE_RULES.get(op_name(node))
        try:
            form = rule(OpCall(self, node)) if rule is not None else None
        except (TypeError, ValueError, NotImplementedError):  # sympy orders no infinite or undefined values
            form = None
        if form is None and node.meta.get(BY_PLACE):
            return self.by_place(node)
        return self._computed(node) if form is None else _normal(form)

    def by_place(self, node: fx.Node) -> Form | None:
        """A table of numbers by place, as long as it can be computed up to LONGEST_TABLE."""
        longest = LONGEST_TABLE if node not in self.tainted else 0
        while longest >= 64:
            try:
                values = evaluate_for_length(node, self.tokens, self.constants, self.gm, longest)
            except (IndexError, RuntimeError, TooLarge):
                longest //= 2
                continue
            self.read |= {n.name for n in cone(node) if n.name in self.constants}
            return Form(self._table(node, values).expr, shape_of(node))
        return None

    def _leaf(self, node: fx.Node) -> Form | None:
        if node.name in self.positions:
            shape = shape_of(node)
            return Form(axis(len(shape) - 1), shape)
        tensor = self.constant(node)
        if tensor is None:
            return None
        self.read.add(node.name)
        if tensor.numel() == 1 and not tensor.is_meta and not isinstance(tensor, FakeTensor):
            value = tensor.detach().reshape(()).item()
            self.numbers.add(node.name)
            return Form(
                sympy.true if value is True else sympy.false if value is False else number(value),
                shape_of_tensor(tensor),
            )
        return self._table(node, tensor)

    def _table(self, node: fx.Node, tensor: Tensor) -> Form:
        """The tensor as an uninterpreted function of its indices."""
        name = f"table_{node.name}"
        self.tables[name] = tensor
        self._behind[name] = {n.name for n in cone(node) if n.name in self.constants}
        shape = shape_of_tensor(tensor)
        indices = [sympy.Integer(0) if s == 1 else axis(i) for i, s in enumerate(shape)]
        read = sympy.Function(name, real=True, integer=not tensor.is_floating_point() or None)(*indices)
        return Form(sympy.Ne(read, 0) if tensor.dtype is torch.bool else read, shape)

    def _computed(self, node: fx.Node) -> Form | None:
        """A value computed from constants alone: its own table."""
        if node in self.counting or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        if any(tensor.is_meta for tensor in map(self.constant, node.all_input_nodes) if tensor is not None):
            return None
        self.read |= {n.name for n in cone(node) if n.name in self.constants}
        return self._table(node, evaluate_for_length(node, self.tokens, self.constants, self.gm, 2))


def _content_dependent(gm: fx.GraphModule, tokens: str) -> set[fx.Node]:
    tainted: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node.name == tokens:
                tainted.add(node)
        elif packet(node) not in SHAPE_ONLY and any(a in tainted for a in node.all_input_nodes):
            tainted.add(node)
    return tainted


def _length_dependent(gm: fx.GraphModule, tokens: str, positions: set[str]) -> set[fx.Node]:
    """Nodes whose value or shape depends on the number of tokens (or on the tokens)."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.name == tokens or node.name in positions or any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _normal(form: Form) -> Form:
    zeros = {axis(i): 0 for i, s in enumerate(form.shape) if s == 1}
    used = form.expr.free_symbols & set(zeros) if hasattr(form.expr, "free_symbols") else set()
    if used:
        form = Form(sympy.sympify(form.expr).xreplace({s: sympy.Integer(0) for s in used}), form.shape)
    return decided(form) if hasattr(form.expr, "atoms") else form
