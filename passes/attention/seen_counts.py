"""The number of keys that each query sees, as the row sums of a mask: a function of the query's place."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name, source_line
from treespec_compiler.ir.specs import Limit, MaskSpec

from ..forms.biases import NotAMask
from ..forms.by_value import SampledValues
from ..forms.closed_form import ClosedForms, broadcast, shape_of
from ..forms.evaluate import TooLarge, cone, evaluate_for_length
from ..forms.masks import classify
from ..forms.score_check import checked
from ..framework.state import GraphState
from .recomputed import recomputed
from .weight_path import zeros_and_ones

aten = torch.ops.aten


def over_last(node: fx.Node) -> bool:
    """Whether a reduction is one over the last dimension alone."""
    dims: Any = argument(node, "dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return (
        len(dims) == 1
        and isinstance(dims[0], int)
        and dims[0] % len(shape_of(node.args[0])) == len(shape_of(node.args[0])) - 1
    )


def with_length(state: GraphState, forms: ClosedForms, value: fx.Node) -> bool:
    """Whether a number, or what is none of places, is made of the number of tokens."""
    if value in forms.tainted:
        return False
    if not isinstance(value.meta["val"], Tensor):
        return not isinstance(value.meta["val"], (int, float))
    form = forms.of(value)
    return form is not None and state.length in form.expr.free_symbols


def counted_by_place(state: GraphState, forms: ClosedForms, value: Any, at: fx.Node) -> Any:
    """`value`, with the row sums of masks in it computed from the query's place, where they are proved to be that."""
    if not isinstance(value, fx.Node) or value in forms.tainted:
        return value
    known: dict[fx.Node, fx.Node] = {}
    for node in cone(value):
        made = _count(state, forms, node, at) if op_name(node) == "aten.sum" else None
        if made is not None:
            known[node] = made
    return recomputed(state, value, known, at) if known else value


def _count(state: GraphState, forms: ClosedForms, node: fx.Node, at: fx.Node) -> fx.Node | None:
    mask: Any = node.args[0]
    square = shape_of(mask)[-2:] == (state.length, state.length) and all(s == 1 for s in shape_of(mask)[:-2])
    spec = _mask(state, forms, mask) if square and over_last(node) else None
    if spec is None or spec.pattern or (spec.window and spec.chunk):
        return None
    if spec.limit is not None:
        state.limits.append(Limit(spec.limit, f"mask counted at {source_line(node) or 'attention'}"))
    value = node.meta["val"]
    length = state.call(aten.sym_size.int, (state.node(state.tokens), 1), like=at)
    places = state.call(aten.arange.default, (length,), {"device": value.device}, like=at)
    # NOTE written with ops that have no closed form: a clamp or remainder that has one would have to be a position.
    count = state.call(aten._to_copy.default, (places,), {"dtype": torch.float64}, like=at)
    if spec.chunk:
        count = state.call(aten.fmod.Scalar, (count, spec.chunk), like=at)
    count = state.call(aten.add.Tensor, (count, 1), like=at)
    if spec.window:
        gap = state.call(aten.rsub.Scalar, (count, spec.window), like=at)
        count = state.call(aten.rsub.Scalar, (state.call(aten.relu.default, (gap,), like=at), spec.window), like=at)
    sizes = [length if s == state.length else int(s) for s in shape_of(node)]
    count = state.call(aten.reshape.default, (count, sizes), like=at)
    return state.call(aten._to_copy.default, (count,), {"dtype": value.dtype}, like=at)


def _mask(state: GraphState, forms: ClosedForms, node: fx.Node) -> MaskSpec | None:
    """What a mask of zeros and ones shows; None: it is not proved."""
    form = forms.of(node)
    if form is None or not (form.is_bool or zeros_and_ones(forms, form)):
        return None
    shown = node
    if node.meta["val"].dtype is not torch.bool:
        shown = state.call(aten.ne.Scalar, (node, 0), like=node.next)
        form = state.closed_forms().of(shown)
    if form is None:
        return None
    one = sympy.Integer(1)

    def evaluate(n: int) -> Tensor:
        try:
            value = evaluate_for_length(shown, state.tokens, state.constants, state.gm, n)
        except TooLarge:
            raise NotAMask("the mask is too large to be compared whole") from None
        return value.expand(*value.shape[:-2], n, n).cpu()

    try:
        form = broadcast(form, (one, one, state.length, state.length))
        scoring = classify(form, state.length, evaluate, forms.tables, sinks=True)
        sampled = SampledValues(shown, state.gm, state.tokens, state.constants, state.max_context)
        limit = checked(scoring, None, sampled, sinks=True)
    except NotAMask:
        return None
    state.proved_by(shown)
    return (
        scoring.mask
        if limit is None
        else MaskSpec(scoring.mask.window, limit, scoring.mask.chunk, scoring.mask.pattern)
    )
