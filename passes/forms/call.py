"""One call of an op, as the rules of closed forms see it: arguments as forms and sizes."""

from __future__ import annotations

from typing import Any, Protocol

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from treespec_compiler.ir.arguments import argument, signature

from .form import Form, broadcast, number, shape_of, varies


class Forms(Protocol):
    """Where a rule finds its operands' forms."""

    def of(self, node: fx.Node) -> Form | None: ...


class OpCall:
    """Arguments of one node, resolved to forms and sizes."""

    def __init__(self, forms: Forms, node: fx.Node) -> None:
        self.forms, self.node = forms, node
        self.shape = shape_of(node)
        self.dtype: torch.dtype = node.meta["val"].dtype

    def arg(self, name: str, default: Any = None) -> Any:
        return argument(self.node, name, default)

    @property
    def operands(self) -> tuple[Any, ...]:
        """What an elementwise op combines: its arguments up to `alpha`, which some overloads have behind them."""
        known = signature(self.node.target)
        return self.node.args if known is None else self.node.args[: known.at.get("alpha")]

    def form(self, value: Any) -> Form | None:
        if isinstance(value, fx.Node):
            return self.forms.of(value)
        if isinstance(value, bool):
            return Form(sympy.true if value else sympy.false, ())
        if isinstance(value, (int, float)):
            return Form(number(value), ())
        return None

    def size(self, value: Any) -> sympy.Expr | None:
        if isinstance(value, fx.Node):
            form = self.forms.of(value)
            return form.expr if form is not None and form.shape == () else None
        return sympy.Integer(value) if isinstance(value, int) else None

    def broadcast(self, value: Any) -> Form | None:
        """The argument as a form over this node's own axes."""
        form = self.form(value)
        return None if form is None else broadcast(form, self.shape)

    def result(self, expr: Any) -> Form | None:
        """Wrap an expression, converting between booleans and numbers as the node's dtype asks."""
        form = Form(sympy.sympify(expr), self.shape)
        if self.dtype is torch.bool:
            return Form(form.as_bool(), self.shape)
        # NOTE bfloat16 counts to 256 and int8 to 127: an index in such a type is no closed form any more.
        if self.dtype.itemsize < 4 and varies(form.as_number()) and not self._only_moves(form.expr):
            return None
        return Form(form.as_number(), self.shape)

    def _only_moves(self, expr: Any) -> bool:
        """Whether the value is a table's, which an operand of the same dtype holds: nothing was rounded."""
        same = [a for a in self.node.all_input_nodes if getattr(a.meta.get("val"), "dtype", None) is self.dtype]
        held = {table.func for a in same if (form := self.forms.of(a)) is not None for table in form.tables}
        return isinstance(expr, AppliedUndef) and expr.func in held
