"""recognize attention without a softmax: f(q k^T) v, where each weight is made of its own score alone.

Read backwards from the product with the values. Weights may be set to 0 (that hides a key), multiplied by what all keys
share, and divided by their own sum; below is one activation, and scores that are read as those of a softmax are, but
that nothing may be left out: what is constant along a row counts here. A factor goes behind the product with the
values, and a sum of weights is one more column of values, of ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from treespec_compiler.errors import Refusal
from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name
from treespec_compiler.ir.scores import POINTWISE

from ..forms.closed_form import ClosedForms, shape_of
from ..forms.masks import HIDDEN
from ..framework.state import GraphState, refuse
from .recomputed import recomputed
from .seen_counts import counted_by_place, over_last, with_length
from .spelled_out import Reader, Scores
from .weight_path import PRODUCTS, zeroing

aten = torch.ops.aten

_SAME = ("aten._to_copy", "aten.reshape", "aten.expand")
_NORMS = ("aten.norm", "aten.linalg_vector_norm")
# Steps from a factor to the sum of weights that it is made of.
_FEW = 8


@dataclass(frozen=True)
class Factor:
    """What weights are multiplied with or divided by (`op`); `totals`: nodes in `value` that are the sums of the
    weights as they were before."""

    op: Any
    value: Any
    totals: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class PointwiseSite:
    """One attention: its scores, what makes weights of them, the values, and the factors, innermost first."""

    scores: Scores
    activation: str
    values: fx.Node
    factors: tuple[Factor, ...]


class PointwiseReader(Reader):
    """Parses scores of which nothing is left out."""

    activation: str

    def add(self, scores: Scores, extra: Any, sign: int = 1) -> Scores | None:
        # A score that was set to 0 hides while nothing is added to it.
        if scores.nulled or scores.inner is not None:
            return None
        row = self._row(scores, extra)
        if row is not None:
            row = row if sign > 0 else self.emit(aten.neg.default, row)
            return None if scores.shift is not None else replace(scores, shift=row)
        return super().add(scores, extra, sign) if self._lowest_hides else None

    def shifts(self, scores: Scores, extra: Any) -> bool:
        return False

    def override(self, scores: Scores, condition: Any, value: Any, *, when: bool) -> Scores | None:
        fixed = self.number(value)
        if fixed is None or fixed <= HIDDEN:
            return super().override(scores, condition, value, when=when) if self._lowest_hides else None
        if fixed <= 0 and _weight(self.activation, fixed) == 0 and not self._depends(condition):
            hidden = super().override(scores, condition, -math.inf, when=when)
            return None if hidden is None else replace(hidden, nulled=True)
        return super().override(scores, condition, value, when=when)

    @property
    def _lowest_hides(self) -> bool:
        return all(_weight(self.activation, lowest) == 0 for lowest in (-math.inf, HIDDEN))

    def _row(self, scores: Scores, extra: Any) -> fx.Node | None:
        """What is added to all keys of a query alike, [.., T, 1]; None: another addend."""
        if isinstance(extra, (int, float)):
            kind = {"dtype": scores.q.meta["val"].dtype, "device": self._device}
            extra = self.emit(aten.full.default, [1, 1], float(extra), **kind)
        if shape_of_tensor(extra)[-1:] not in ((), (1,)):
            return None
        _check_length(self.state, self.forms, extra)
        zeros = self.emit(aten.zeros_like.default, self.emit(aten.slice.Tensor, scores.q, -1, 0, 1))
        return self.emit(aten.add.Tensor, zeros, extra)


def _weight(activation: str, score: float) -> float:
    return float(POINTWISE[activation](torch.tensor(score)))


def shape_of_tensor(node: fx.Node) -> tuple[Any, ...]:
    """() for a number that is computed in the graph."""
    return shape_of(node) if isinstance(node.meta["val"], torch.Tensor) else ()


def candidates(state: GraphState) -> list[fx.Node]:
    """Products of tokens by tokens with what depends on tokens."""
    found = [n for n in state.graph.nodes if op_name(n) in PRODUCTS and _over_tokens(state, n.args[0])]
    tainted = state.closed_forms().tainted if found else set()
    return [n for n in found if n.args[0] in tainted and n.args[1] in tainted]


def _over_tokens(state: GraphState, node: Any) -> bool:
    return isinstance(node, fx.Node) and shape_of(node)[-2:] == (state.length, state.length)


def pointwise_site(state: GraphState, product: fx.Node, reader: PointwiseReader) -> PointwiseSite | None:
    """What the product of weights and values computes, or None where it is no such attention."""
    reader.at = product
    walk = _Walk(state, reader.forms, product)
    core = walk.down(product.args[0])
    activation, inner = _activated(core)
    reader.activation = activation
    scores = reader.read(inner)
    if scores is None or scores.shifted or scores.inner is not None or scores.sinks is not None:
        return None
    if not all(reader.keeps(scores.q, n) for n in (core, *walk.steps)) or (walk.norms and activation == "identity"):
        return None
    for where in walk.zeroed:
        hidden = reader.emit(aten.full.default, [], -math.inf, dtype=torch.float32, device=reader._device)
        kept = reader.emit(aten.zeros_like.default, hidden) if scores.mask is None else scores.mask
        scores = replace(scores, mask=reader.emit(aten.where.self, where, hidden, kept))
    values: Any = product.args[1]
    if any(f.totals for f in walk.factors):
        ones = reader.emit(aten.ones_like.default, reader.emit(aten.slice.Tensor, values, -1, 0, 1))
        values = reader.emit(aten.cat.default, [values, ones], -1)
    return PointwiseSite(scores, activation, values, (*reversed(walk.factors),))


def scaled_output(state: GraphState, at: fx.Node, product: fx.Node, site: PointwiseSite) -> fx.Node:
    """The product of weights and values [.., T, D], or D + 1 with a column of the weights' sums, times the factors."""
    width = int(shape_of(at)[-1])
    for factor in site.factors:
        value = factor.value
        if factor.totals:
            total = state.call(aten.slice.Tensor, (product, -1, width, width + 1), like=at)
            flat = state.call(aten.squeeze.dim, (total, -1), like=at)
            known = {n: total if len(shape_of(n)) == len(shape_of(total)) else flat for n in factor.totals}
            value = recomputed(state, value, known, at)
        product = state.call(factor.op, (product, value), like=at)
    return (
        product
        if shape_of(product) == shape_of(at)
        else state.call(aten.slice.Tensor, (product, -1, 0, width), like=at)
    )


def _activated(node: Any) -> tuple[str, Any]:
    """The activation, and the scores that it is given."""
    name = op_name(node)
    if name == "aten.sigmoid":
        return "sigmoid", node.args[0]
    if _is_relu(node):
        return "relu", node.args[0]
    squared = name == "aten.square" or (name == "aten.pow" and node.args[1] == 2)
    if (squared or (name == "aten.mul" and node.args[0] is node.args[1])) and _is_relu(node.args[0]):
        return "relu squared", node.args[0].args[0]
    return "identity", node


def _is_relu(node: Any) -> bool:
    name = op_name(node)
    if name in ("aten.clamp", "aten.clamp_min"):
        return argument(node, "min") == 0 and argument(node, "max") is None
    return name == "aten.relu"


class _Walk:
    """What is done to weights between their activation and the product with the values, from there backwards."""

    def __init__(self, state: GraphState, forms: ClosedForms, at: fx.Node) -> None:
        self.state, self.forms, self.at = state, forms, at
        self.zeroed: list[fx.Node] = []
        self.factors: list[Factor] = []
        self.steps: list[fx.Node] = []
        self.norms = False
        """Whether a sum is one of absolute values."""

    def down(self, node: Any) -> Any:
        """The weights before all of it."""
        inner = self._before(node)
        while inner is not None:
            self.steps.append(node)
            node, inner = inner, self._before(inner)
        return node

    def _before(self, node: Any) -> Any:
        name = op_name(node)
        if name in _SAME:
            source: Any = node.args[0]
            whole = [s for s in shape_of(source) if s != 1] == [s for s in shape_of(node) if s != 1]
            return source if whole and _over_tokens(self.state, source) else None
        for inner in node.all_input_nodes:
            if inner not in self.forms.tainted or shape_of_tensor(inner) != shape_of_tensor(node):
                continue
            where = zeroing(self.state, self.forms, inner, node)
            if where is not None:
                self.zeroed.append(where)
                return inner
            if self._factor(inner, node):
                return inner
        return None

    def _factor(self, inner: fx.Node, node: fx.Node) -> bool:
        name = op_name(node)
        if name not in ("aten.mul", "aten.div") or len(shape_of(inner)) != len(shape_of(self.at)):
            return False
        a, value = node.args[:2]
        if name == "aten.mul" and value is inner:
            a, value = value, a
        if a is not inner or value is inner or (name == "aten.div" and argument(node, "rounding_mode") is not None):
            return False
        if isinstance(value, (int, float)):
            self.factors.append(Factor(node.target, value))
            return True
        if op_name(value) == "aten.expand" and shape_of(value.args[0])[-1:] == (1,):
            value = value.args[0]
        if shape_of_tensor(value)[-1:] not in ((), (1,)):
            return False
        _check_length(self.state, self.forms, value)
        op = aten.mul.Tensor if name == "aten.mul" else aten.div.Tensor
        totals = self._totals(value, inner)
        value = counted_by_place(self.state, self.forms, value, self.at)
        self.factors.append(Factor(op, value, totals))
        return True

    def _totals(self, value: fx.Node, weights: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes, a few steps behind `value`, that sum up these weights over their keys."""
        found: list[fx.Node] = []
        reached = {value}
        for _ in range(_FEW):
            for node in reached:
                if node.op == "call_function" and node.args and node.args[0] is weights and self._is_total(node):
                    found.append(node)
            reached = {a for n in reached if n not in found for a in n.all_input_nodes if a is not weights}
        return tuple(dict.fromkeys(found))

    def _is_total(self, node: fx.Node) -> bool:
        if op_name(node) in _NORMS and argument(node, "dtype") is None and over_last(node):
            one = argument(node, "ord", argument(node, "p")) == 1
            self.norms |= one
            return one
        return op_name(node) == "aten.sum" and argument(node, "dtype") is None and over_last(node)


def _check_length(state: GraphState, forms: ClosedForms, value: fx.Node) -> None:
    """Weights that depend on how many tokens there are change with each token that follows."""
    if with_length(state, forms, value):
        raise refuse(
            Refusal.ATTENTION,
            "attention weights depend on the number of tokens in the text: those of earlier tokens change with each "
            "that follows",
            value,
            "use the number of keys that a query sees, torch.arange(1, T + 1)[:, None], or a constant",
        )
