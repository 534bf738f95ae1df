"""Where rows beside the text meet the tokens' rows: attention, its masks, and the places where they are cut off."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..attention.spelled_out import SOFTMAXES
from ..attention.weight_path import PRODUCTS
from ..forms.closed_form import shape_of
from ..forms.masks import HIDDEN
from .apart import Apart, ApartRows, ApartRule, Stop
from .front_bias import FrontBias, bias_of
from .front_mask import FrontBlock, block_of

aten = torch.ops.aten


def cut(apart: Apart, node: fx.Node) -> ApartRows | None:
    """Rows of one part alone take the place of the cut; nothing is left to follow."""
    source: Any = node.args[0]
    rows, dim = apart.rows[source], int(argument(node, "dim")) % len(shape_of(source))
    if dim != rows.at or rows.keys is not None:
        return apart.alone(node)
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    first, last = _place(apart, start, 0), _place(apart, end, apart.beside.whole)
    if step != 1:
        return None
    front = apart.beside.count if apart.beside.front else 0
    if first == front and last == front + apart.beside.length:
        _instead(apart, node, rows.tokens)
    elif first == 0 and last == front and rows.others is not None:
        _instead(apart, node, rows.others)
    elif apart.beside.front and isinstance(start, int) and start < 0 and last == apart.beside.whole:
        _instead(apart, node, apart.emit(node, aten.slice.Tensor, rows.tokens, dim, start))
    return None


def _place(apart: Apart, value: Any, default: Any) -> Any:
    """A place in a slice as a number of rows from the start."""
    if value is None:
        return sympy.sympify(default)
    expr = value.meta["val"].node.expr if isinstance(value, fx.Node) else sympy.Integer(value)
    if expr.is_Integer and expr >= 2**31:
        return apart.beside.whole
    if expr.is_negative or (not expr.is_Integer and expr.could_extract_minus_sign()):
        expr = apart.beside.whole + expr
    return sympy.simplify(expr)


def picked(apart: Apart, node: fx.Node) -> ApartRows | None:
    """`select`: the last row of all is the last token's."""
    source: Any = node.args[0]
    rows, dim = apart.rows[source], int(node.args[1]) % len(shape_of(source))
    if dim != rows.at:
        return apart.alone(node)
    if apart.beside.front and node.args[2] == -1 and rows.keys is None:
        _instead(apart, node, apart.emit(node, aten.select.int, rows.tokens, dim, -1))
    return None


def split(apart: Apart, node: fx.Node) -> ApartRows | None:
    source: Any = node.args[0]
    rows, sizes = apart.rows[source], node.args[1]
    if int(argument(node, "dim")) % len(shape_of(source)) != rows.at:
        return apart.alone(node)
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or rows.keys is not None:
        return None
    wanted = [apart.beside.count, apart.beside.length] if apart.beside.front else [apart.beside.length, None]
    known = [s.meta["val"].node.expr if isinstance(s, fx.Node) else sympy.Integer(s) for s in sizes]
    if known[0] != wanted[0]:
        return None
    for user in list(node.users):
        part = (rows.others, rows.tokens)[user.args[1]] if apart.beside.front else (rows.tokens, None)[user.args[1]]
        if part is not None:
            _instead(apart, user, part)
    return None


def join(apart: Apart, node: fx.Node) -> ApartRows | None:
    """More constants in front of those that are there."""
    found = [apart.rows[a] for a in node.all_input_nodes if a in apart.rows]
    at = int(argument(node, "dim")) % len(shape_of(node))
    return None if any(r.at == at for r in found) else apart.alone(node)


def _instead(apart: Apart, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    apart.matches += 1


def fused(apart: Apart, node: fx.Node) -> ApartRows | None:
    """scaled_dot_product_attention of all rows among each other."""
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    mask, causal = argument(node, "attn_mask"), bool(argument(node, "is_causal"))
    rows = [apart.rows.get(x) for x in (q, k, v)]
    rank = len(shape_of(q))
    if any(r is None or r.at != rank - 2 or r.keys is not None for r in rows) or (mask is None and not causal):
        return None
    own, keys, values = rows
    assert own is not None and keys is not None and values is not None
    rest = {"scale": argument(node, "scale"), "enable_gqa": argument(node, "enable_gqa")}
    if not apart.beside.front:
        part = None if mask is None else _square(apart, node, mask, visible=mask.meta["val"].dtype is torch.bool)
        args = (own.tokens, keys.tokens, values.tokens, part, 0.0, causal)
        return ApartRows(apart.emit(node, node.target, *args, **rest), None, rank - 2)
    assert own.others is not None and keys.others is not None and values.others is not None
    joined = [_all(apart, node, r) for r in (keys, values)]
    among: FrontBlock | FrontBias = FrontBlock("causal")
    if mask is None:
        seen = _causal(apart, node)
    else:
        among = _others_block(apart, mask, node, visible=mask.meta["val"].dtype is torch.bool)
        if isinstance(among, FrontBias) and not among.hides:
            return None
        seen = apart.part(node, mask, len(shape_of(mask)) - 2)
    tokens = apart.emit(node, node.target, own.tokens, *joined, seen, 0.0, False, **rest)
    others = _among(apart, node, own.others, keys.others, values.others, among)
    return ApartRows(tokens, others, rank - 2)


def _all(apart: Apart, node: fx.Node, rows: ApartRows) -> fx.Node:
    return apart.emit(node, aten.cat.default, [rows.others, rows.tokens], rows.at)


def _causal(apart: Apart, node: fx.Node) -> fx.Node:
    """[T, n + T]: what the tokens see."""
    length, device = apart.tokens_size(node), node.meta["val"].device
    whole = apart.emit_size(operator.add, node, length, apart.beside.count)
    here = apart.emit(node, aten.arange.start, apart.beside.count, whole, device=device)
    there = apart.emit(node, aten.arange.default, whole, device=device)
    return apart.emit(node, aten.ge.Tensor, apart.emit(node, aten.unsqueeze.default, here, -1), there)


def _among(apart: Apart, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, block: FrontBlock | FrontBias) -> fx.Node:
    """Attention of the constants among themselves, written out."""
    scale = argument(node, "scale")
    heads, kv = shape_of(q)[-3], shape_of(k)[-3]
    if heads != kv:
        times = int(heads / kv)
        k, v = (apart.emit(node, aten.repeat_interleave.self_int, x, times, len(shape_of(x)) - 3) for x in (k, v))
    scores = apart.emit(node, aten.matmul.default, q, apart.emit(node, aten.transpose.int, k, -2, -1))
    scale = 1.0 / math.sqrt(int(shape_of(q)[-1])) if scale is None else scale
    scores = block.hide(apart.state, node, apart.emit(node, aten.mul.Tensor, scores, scale), apart.beside.count)
    return apart.emit(node, aten.matmul.default, apart.emit(node, aten.softmax.int, scores, -1), v)


def _others_block(apart: Apart, mask: fx.Node, node: fx.Node, *, visible: bool) -> FrontBlock | FrontBias:
    """What the constants see of each other, or what is added to their scores; raises Stop where they see tokens."""
    found: FrontBlock | FrontBias | None = block_of(apart.state, mask, apart.beside, visible=visible)
    if found is None and op_name(node) not in ("aten.masked_fill", "aten.where"):
        found = bias_of(apart.state, mask, apart.beside, node)
    if found is None:
        raise Stop
    return found


def _square(apart: Apart, node: fx.Node, mask: fx.Node, *, visible: bool) -> fx.Node:
    """The tokens' part of a mask [.., whole, whole] that hides what is behind; raises Stop where it does not."""
    if block_of(apart.state, mask, apart.beside, visible=visible) is None:
        raise Stop
    rank = len(shape_of(mask))
    part = apart.part(node, mask, rank - 1)
    return apart.part(node, part, rank - 2) if shape_of(mask)[-2] == apart.beside.whole else part


def product(apart: Apart, node: fx.Node) -> ApartRows | None:
    a, b = node.args[:2]
    left, right = apart.rows.get(a), apart.rows.get(b)
    rank = len(shape_of(node))
    if left is None or right is None or left.at != rank - 2:
        return apart.alone(node) if right is None else None
    if left.keys is None and right.at == rank - 1:
        wide = _all(apart, node, right) if apart.beside.front else right.tokens
        tokens = apart.emit(node, node.target, left.tokens, wide)
        others = None if left.others is None else apart.emit(node, node.target, left.others, right.others)
        return ApartRows(tokens, others, rank - 2, keys=rank - 1)
    if left.weighted and left.keys == rank - 1 and right.at == rank - 2:
        wide = _all(apart, node, right) if apart.beside.front else right.tokens
        tokens = apart.emit(node, node.target, left.tokens, wide)
        others = None if left.others is None else apart.emit(node, node.target, left.others, right.others)
        return ApartRows(tokens, others, rank - 2)
    return None


def softmax(apart: Apart, node: fx.Node) -> ApartRows | None:
    rows = apart.rows[node.args[0]]
    dim = int(argument(node, "dim")) % len(shape_of(node))
    if rows.keys is None or dim != rows.keys:
        return apart.alone(node) if rows.keys is None else None
    if not rows.hidden or rows.weighted:
        return None
    tokens = apart.emit(node, node.target, rows.tokens, *node.args[1:], **dict(node.kwargs))
    others = rows.others
    if others is not None:
        others = apart.emit(node, node.target, others, *node.args[1:], **dict(node.kwargs))
    return replace(rows, tokens=tokens, others=others, weighted=True)


def masked(apart: Apart, node: fx.Node) -> ApartRows | None:
    """Scores and a mask over pairs of places: filled where it is true, chosen where it is, or added."""
    name, args = op_name(node), list(node.args)
    value: float | None = 0.0
    if name == "aten.add":
        at = 0 if _scores(apart, args[0]) else 1
        mask, visible = args[1 - at], False
    elif name == "aten.masked_fill":
        at, mask, value, visible = 0, args[1], _number(apart, args[2]), False
    else:
        at = 1 if _scores(apart, args[1]) else 2
        mask, value, visible = args[0], _number(apart, args[3 - at]), at == 1
    if not _scores(apart, args[at]) or not isinstance(mask, fx.Node) or mask in apart.rows or mask in apart.tainted:
        return apart.alone(node)
    scores: Any = args[at]
    rows = apart.rows[scores]
    if shape_of(mask)[-1:] != (apart.beside.whole,):
        return apart.alone(node)
    if rows.keys != len(shape_of(scores)) - 1 or rows.at != rows.keys - 1 or rows.weighted or value is None:
        return None
    if name == "aten.add" and argument(node, "alpha") != 1:
        return None
    if name != "aten.add" and value > HIDDEN:
        return None
    tokens, others, hidden = _hidden(apart, node, rows, mask, visible=visible)
    swap: dict[Any, Any] = {scores: rows.tokens, mask: tokens}
    new = [swap.get(a, a) if isinstance(a, fx.Node) else a for a in args]
    if name == "aten.where":
        kind = {"dtype": scores.meta["val"].dtype, "device": scores.meta["val"].device}
        new[3 - at] = apart.emit(node, aten.full.default, [], value, **kind)
    target = apart.emit(node, node.target, *new, **dict(node.kwargs))
    return replace(rows, tokens=target, others=others, hidden=rows.hidden or hidden)


def _hidden(
    apart: Apart, node: fx.Node, rows: ApartRows, mask: fx.Node, *, visible: bool
) -> tuple[fx.Node, fx.Node | None, bool]:
    """The tokens' part of a mask, the constants' scores under it, and whether it hides what comes later."""
    if not apart.beside.front:
        return _square(apart, node, mask, visible=visible), None, True
    among = _others_block(apart, mask, node, visible=visible)
    assert rows.others is not None
    others = among.hide(apart.state, node, rows.others, apart.beside.count)
    hides = among.hides if isinstance(among, FrontBias) else True
    return apart.part(node, mask, len(shape_of(mask)) - 2), others, hides


def _scores(apart: Apart, value: Any) -> bool:
    return isinstance(value, fx.Node) and value in apart.rows and apart.rows[value].keys is not None


def _number(apart: Apart, value: Any) -> float | None:
    """The one number that a value is everywhere."""
    if isinstance(value, (int, float)):
        return float(value)
    form = apart.forms.of(value) if isinstance(value, fx.Node) and value not in apart.tainted else None
    return float(form.expr) if form is not None and not form.is_bool and form.expr.is_number else None


RULES: dict[str, ApartRule] = {
    "aten.scaled_dot_product_attention": fused,
    "aten.slice": cut,
    "aten.select": picked,
    "aten.split_with_sizes": split,
    "aten.cat": join,
    "aten.masked_fill": masked,
    "aten.where": masked,
    "aten.add": masked,
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys(SOFTMAXES, softmax),
}
