"""Keys hidden by what token they are: `ids == pad`, in a mask or by itself.

A condition on pairs of tokens is taken apart into one on their places and one on the key's token. The second becomes a
part of K, as a bias by key does (`key_bias`): a very low number, whose weight is exactly 0 beside any key that is seen.
So the first token, which every later one sees, must be another one: a text that begins with a hidden token leaves the
model itself with rows of nothing but hidden keys. Programs refuse such a text when it comes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.evaluate import Values, cone
from ..forms.patterns import HIDDEN
from ..framework.state import GraphState, refuse
from ..locality.ids import input_vocab
from .weight_path import zeros_and_ones

aten = torch.ops.aten

PADDED = "padding"
"""In an attention's metadata: whether keys are hidden by their token."""

_AND = ("aten.logical_and", "aten.bitwise_and", "aten.__and__", "aten.mul")
_OR = ("aten.logical_or", "aten.bitwise_or", "aten.__or__")
_NOT = ("aten.logical_not", "aten.bitwise_not")
_LAID_OUT = ("aten.unsqueeze", "aten.expand", "aten.reshape", "aten.squeeze", "aten._to_copy", "aten.clone")
_OF_TOKENS = {
    *_AND, *_OR, *_NOT, *_LAID_OUT, "aten.eq", "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.add",
    "aten.sub", "aten.logical_xor", "aten.bitwise_xor", "aten.__xor__",
}  # fmt: skip
"""Ops that act on each element alone where a tensor has no dimension but the tokens."""

Emit = Callable[..., fx.Node]


@dataclass(frozen=True)
class SplitCondition:
    """A condition `places | keys`: on the places of query and key, and on the key's token. None: never."""

    places: fx.Node | None = None
    keys: fx.Node | None = None


class Conditions:
    """Takes conditions on pairs of tokens apart; `emit` makes nodes."""

    def __init__(self, state: GraphState, forms: ClosedForms, emit: Emit) -> None:
        self.state, self.forms, self.emit = state, forms, emit

    def parts(self, node: Any, holds: bool = True, laid_out: bool = False) -> SplitCondition | None:
        """Where `node`, a condition or its zeros and ones, is `holds`; None: it is of no such form.

        `laid_out`: it is one of all heads, whatever dimensions stand in front of its last two now.
        """
        if not isinstance(node, fx.Node) or not self._is_truth(node):
            return None
        if node not in self.forms.tainted:
            alone = all(s == 1 for s in shape_of(node)[:-2])
            return SplitCondition(places=self._as(node, holds)) if alone or not laid_out else None
        if self._one_a_key(node):
            return SplitCondition(keys=self._as(node, holds))
        name = op_name(node)
        if name in _NOT or (name == "aten.eq" and node.args[1] == 0):
            return self.parts(node.args[0], not holds, laid_out)
        if name == "aten.ne" and node.args[1] == 0:
            return self.parts(node.args[0], holds, laid_out)
        if name in _LAID_OUT:
            return self.parts(node.args[0], holds, True) if _same_pairs(node) else None
        if name in (_OR if holds else _AND):
            return self.joined(*(self.parts(each, holds, laid_out) for each in node.args[:2]))
        return None

    def joined(self, a: SplitCondition | None, b: SplitCondition | None) -> SplitCondition | None:
        """Where one of both holds."""
        if a is None or b is None:
            return None
        return SplitCondition(self.either(a.places, b.places), self.either(a.keys, b.keys))

    def either(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        if a is None or b is None:
            return b if a is None else a
        return self.emit(aten.logical_or.default, a, b)

    def hiding(self, node: Any) -> SplitCondition | None:
        """Where an additive mask of zeros and numbers that hide is one of the latter."""
        found = self._two_values(node)
        if found is None:
            return None
        condition, yes, no = found
        if {yes <= HIDDEN, no <= HIDDEN} != {True, False} or max(yes, no) != 0:
            return None
        return self.parts(condition, holds=yes <= HIDDEN, laid_out=condition is not node)

    def _two_values(self, node: Any) -> tuple[fx.Node, float, float] | None:
        """(a condition, the value where it holds, and where it does not) of a number that depends on tokens."""
        if not isinstance(node, fx.Node) or node not in self.forms.tainted:
            return None
        if self._is_truth(node):
            return node, 1.0, 0.0
        name = op_name(node)
        if name in _LAID_OUT:
            return self._two_values(node.args[0]) if _same_pairs(node) else None
        if name in ("aten.masked_fill", "aten.where"):
            return self._chosen(node, name)
        if name == "aten.neg":
            return _changed(self._two_values(node.args[0]), operator.neg)
        change = _ARITHMETIC.get(name)
        if change is None or argument(node, "alpha", 1) != 1:
            return None
        a, b = node.args[:2]
        first, second = self._number(a), self._number(b)
        if second is not None:
            return _changed(self._two_values(a), lambda x: change(x, second))
        if first is not None:
            return _changed(self._two_values(b), lambda x: change(first, x))
        return None

    def _chosen(self, node: fx.Node, name: str) -> tuple[fx.Node, float, float] | None:
        if name == "aten.masked_fill":
            no, condition, yes = node.args[:3]
        elif node.target is aten.where.default:
            return None
        else:
            condition, yes, no = node.args[:3]
        numbers = self._number(yes), self._number(no)
        if numbers[0] is None or numbers[1] is None or not isinstance(condition, fx.Node):
            return None
        return condition, numbers[0], numbers[1]

    def _number(self, value: Any) -> float | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        form = self.forms.of(value) if isinstance(value, fx.Node) and value not in self.forms.tainted else None
        return float(form.expr) if form is not None and not form.is_bool and form.expr.is_number else None

    def _is_truth(self, node: fx.Node) -> bool:
        """Whether it is a condition, or zeros and ones."""
        if node.meta["val"].dtype is torch.bool:
            return True
        if node not in self.forms.tainted:
            form = self.forms.of(node)
            return form is not None and not form.is_bool and zeros_and_ones(self.forms, form)
        name = op_name(node)
        if name in _LAID_OUT:
            return self._is_truth(node.args[0])
        return name == "aten.mul" and all(isinstance(a, fx.Node) and self._is_truth(a) for a in node.args[:2])

    def _one_a_key(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return bool(shape) and shape[-1] == self.state.length and all(s == 1 for s in shape[:-1])

    def _as(self, node: fx.Node, holds: bool) -> fx.Node:
        if node.meta["val"].dtype is torch.bool:
            return node if holds else self.emit(aten.logical_not.default, node)
        return self.emit(aten.ne.Scalar if holds else aten.eq.Scalar, node, 0)


_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "aten.add": operator.add,
    "aten.sub": operator.sub,
    "aten.rsub": lambda a, b: b - a,
    "aten.mul": operator.mul,
}


def _same_pairs(node: fx.Node) -> bool:
    """Whether a layout leaves the last two dimensions as they are, or repeats the first of them."""
    before, after = shape_of(node.args[0]), shape_of(node)
    return before[-1:] == after[-1:] and (before[-2:-1] in ((), (1,)) or before[-2:] == after[-2:])


def _changed(
    found: tuple[fx.Node, float, float] | None, change: Callable[[float], float]
) -> tuple[fx.Node, float, float] | None:
    return None if found is None else (found[0], change(found[1]), change(found[2]))


def bias_of(state: GraphState, at: fx.Node, keys: fx.Node, dtype: torch.dtype) -> fx.Node:
    """[.., 1, T] of `dtype`: 0, and for a key that is hidden a number beside which every other weighs more.

    The hidden tokens are written down (`GraphState.padding`). Raises `Unsupported` where tokens do not tell by
    themselves whether they are hidden.
    """
    hidden = _ids(state, at, keys)
    state.padding = sorted({*state.padding, *hidden})
    lowest = -6e4 if dtype == torch.float16 else -1e30  # NOTE finite: a key that is not would be stored as NaN
    kind = {"dtype": dtype, "device": keys.meta["val"].device}
    low, nothing = (state.call(aten.full.default, ([], value), kind, like=at) for value in (lowest, 0.0))
    bias = state.call(aten.where.self, (keys, low, nothing), like=at)
    return bias if len(shape_of(bias)) > 1 else state.call(aten.unsqueeze.default, (bias, 0), like=at)


def _ids(state: GraphState, at: fx.Node, keys: fx.Node) -> list[int]:
    """The token ids for which a condition on tokens holds."""
    forms = state.closed_forms()
    vocab = input_vocab(state)
    inside = cone(keys)
    tokens = [n for n in inside if n in forms.tainted]
    beside = [a for n in tokens for a in _operands(n) if a not in tokens]
    narrow = all(_one_dimension(n, state) for n in tokens)
    fixed = all(_one_element(a) and a not in forms.counting for a in beside)
    known = all(n.name == state.tokens or op_name(n) in _OF_TOKENS for n in tokens)
    if vocab is None or not narrow or not fixed or not known:
        reason = "keys are hidden by the content of the tokens, not by which token each of them is"
        raise refuse(Refusal.CONTENT, reason, at)
    state.proved_by(keys)
    found = _OfEveryToken(state.gm, state.tokens, state.constants, vocab).whole(keys).reshape(-1)
    return [int(i) for i in found.nonzero().flatten()]


def _operands(node: fx.Node) -> list[fx.Node]:
    """What an element of the result is computed from: sizes that it is laid out in are not."""
    return node.all_input_nodes[:1] if op_name(node) in _LAID_OUT else node.all_input_nodes


def _one_dimension(node: fx.Node, state: GraphState) -> bool:
    return [s for s in shape_of(node) if s != 1] == [state.length]


def _one_element(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor) and all(s == 1 for s in shape_of(node))


class _OfEveryToken(Values):
    """For a text of every token there is."""

    def _placeholder(self, node: fx.Node) -> Tensor:
        return torch.arange(self.n)[None] if node.name == self.tokens else super()._placeholder(node)


def check_padding(state: GraphState, site: fx.Node, window: int, chunk: int, pattern: str) -> None:
    """NOTE the first token is one that is seen; of a window, all may be padding. Raises `Unsupported`."""
    if site.meta.get(PADDED) and (window or chunk or pattern):
        raise refuse(
            Refusal.CONTENT,
            "keys are hidden by their token beside a mask that hides the first ones: what is left may be nothing",
            site,
        )
