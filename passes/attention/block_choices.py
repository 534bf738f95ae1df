"""Blocks of keys that an indexer chooses by content, as MiniMax M3 writes them (`ir.chosen_attention`).

    best[h, i, b]  = the largest of q_h[i] . k[j] over the keys j of block b, minus infinity where j > i
                     and infinity for the `local` blocks that end at token i's own
    kept[h, i, b]  = b is one of the min(chosen, blocks) best of row h, i, and is not minus infinity
    token i sees key j where kept[h, i, j // block], and a mask of positions lets it

Blocks begin at multiples of `block`, and the last one is filled up with minus infinity.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import axis, shape_of
from .choice_parts import ChoiceParts, at_most, behind, expression, scaled, topk_of

aten = torch.ops.aten


def block_index(parts: ChoiceParts, node: fx.Node) -> dict[str, Any] | None:
    """The indexer's arguments, as `treespec::attention` has them, of a bool mask [1, H, T, T] of what is kept."""
    length = parts.state.length
    if op_name(node) == "aten.repeat_interleave" and argument(node, "dim") in (1, -3):
        if not isinstance(node.args[1], int):
            return None
        node = node.args[0]  # each choice for so many heads of attention, one after another
    wide: Any = node
    if op_name(node) == "aten.slice":  # which a whole number of blocks goes without
        if not _cuts(node, length):
            return None
        wide = node.args[0]
    if op_name(wide) != "aten.repeat_interleave" or argument(wide, "dim") not in (3, -1):
        return None
    block = wide.args[1]
    if not isinstance(block, int) or block < 2:
        return None
    blocks = _count(parts, block)
    square = shape_of(node)[2:] in ((length, length), (length, block * blocks))  # of whole blocks the two are one
    chosen = _marked(parts, wide.args[0], blocks) if square else None
    return None if chosen is None else _chosen_blocks(parts, chosen, block, blocks)


def _count(parts: ChoiceParts, block: int) -> sympy.Expr:
    """How many blocks T tokens have, the last of which may be a part, as shapes say it."""
    tokens: Any = parts.state.node(parts.state.tokens).meta["val"].shape[1]
    return sympy.sympify(expression(-(-tokens // block)))


def _cuts(node: fx.Node, size: sympy.Expr) -> bool:
    """Whether a slice of the first `size` along the last of four dimensions."""
    whole = argument(node, "start") in (None, 0) and argument(node, "step") in (None, 1)
    return whole and argument(node, "dim") in (3, -1) and len(shape_of(node)) == 4 and shape_of(node)[3] == size


def _marked(parts: ChoiceParts, node: Any, blocks: sympy.Expr) -> fx.Node | None:
    """The topk whose choices, but for those of minus infinity, a table of blocks marks: [1, H, T, blocks]."""
    if op_name(node) != "aten.eq" or not isinstance(node.args[1], (int, float)):
        return None
    cut, mark = node.args
    if op_name(cut) != "aten.slice" or not _cuts(cut, blocks):
        return None
    marks: Any = cut.args[0]
    if op_name(marks) != "aten.scatter" or argument(marks, "dim") not in (3, -1):
        return None
    table, index, value = argument(marks, "self"), argument(marks, "index"), argument(marks, "value", None)
    form = None if parts.depends(table) else parts.forms.of(table)
    if form is None or not form.expr.is_number or form.is_bool or shape_of(marks)[3] != blocks + 1:
        return None
    if value != mark or form.expr == mark:
        return None
    return _where_finite(index, blocks)


def _where_finite(index: Any, blocks: sympy.Expr) -> fx.Node | None:
    """places of topk, with the one behind all blocks (by way of -1) in place of those whose value is minus infinity."""
    if op_name(index) != "aten.masked_fill" or expression(argument(index, "value")) != blocks:
        return None
    marked, negative = argument(index, "self"), argument(index, "mask")
    if op_name(negative) != "aten.lt" or negative.args[0] is not marked or negative.args[1] != 0:
        return None
    if op_name(marked) != "aten.masked_fill" or argument(marked, "value") != -1:
        return None
    found, lowest = topk_of(argument(marked, "self"), 1), argument(marked, "mask")
    if op_name(lowest) != "aten.eq" or lowest.args[1] != -math.inf:
        return None
    return found if found is not None and topk_of(lowest.args[0], 0) is found else None


def _chosen_blocks(parts: ChoiceParts, topk: fx.Node, block: int, blocks: sympy.Expr) -> dict[str, Any] | None:
    chosen, best = at_most(argument(topk, "k"), blocks), argument(topk, "self")
    local = 0
    if op_name(best) == "aten.scatter":
        found = _local_blocks(parts, best, block)
        if found is None:
            return None
        local, best = found, argument(best, "self")
    if chosen is None or op_name(best) != "aten.amax" or argument(best, "keepdim"):
        return None
    scores = _in_blocks(parts, best, block, blocks)
    masked = None if scores is None else parts.hidden_behind(scores, shape_of(scores))
    product = None if masked is None else _product(parts, masked[0])
    if masked is None or product is None:
        return None
    return {**product, "index_mask": masked[1], "chosen": chosen, "block": block, "local": local}


def _local_blocks(parts: ChoiceParts, node: fx.Node, block: int) -> int | None:
    """How many blocks, a token's own and those in front of it, are given an infinite score."""
    index = argument(node, "index")
    if argument(node, "value", None) != math.inf or argument(node, "dim") not in (3, -1) or parts.depends(index):
        return None
    form = parts.forms.of(index)
    count = shape_of(index)[3]
    if form is None or not count.is_Integer or shape_of(index)[:3] != shape_of(node)[:3]:
        return None
    for back in range(int(count)):
        own = sympy.Max(0, sympy.floor(axis(2) / block) - back)
        if form.expr.subs(axis(3), back) != own:
            return None
    return int(count)


def _in_blocks(parts: ChoiceParts, best: fx.Node, block: int, blocks: sympy.Expr) -> fx.Node | None:
    """Scores [1, H, T, T] of which `best` [1, H, T, blocks] is the largest in each block."""
    split: Any = best.args[0]
    if op_name(split) != "aten.reshape" or list(best.args[1]) not in ([-1], [4]):
        return None
    filled: Any = split.args[0]
    length, front = parts.state.length, shape_of(filled)[:3]
    # NOTE what was asked for, not the shape: of a whole number of blocks that says T // blocks for the size of one.
    sizes: Any = split.args[1]
    if [expression(s) for s in sizes] != [*front, blocks, block] or front[0] != 1 or front[2] != length:
        return None
    if op_name(filled) == "aten.pad":
        before, mode = argument(filled, "self"), argument(filled, "mode")
        at_front, *more = argument(filled, "pad")[::2]
        if mode != "constant" or argument(filled, "value") != -math.inf or more or at_front != 0:
            return None
        filled = before
    return filled if shape_of(filled) == (*front, length) else None


def _product(parts: ChoiceParts, node: Any) -> dict[str, Any] | None:
    """scale * q [1, H, T, D] @ k [1, 1, D, T], computed in the type of q and k or a wider one."""
    node, scale = scaled(node)
    if op_name(node) != "aten.matmul" or not all(map(parts.depends, node.args[:2])):
        return None
    q, k = (behind(x, "aten._to_copy") for x in node.args[:2])
    heads, length, dim = shape_of(q)[1:]
    if not (heads.is_Integer and dim.is_Integer) or length != parts.state.length:
        return None
    if op_name(k) == "aten.transpose":
        before = behind(k.args[0], "aten._to_copy")
        k = parts.emit(aten.transpose.int, before, *k.args[1:3])
    if shape_of(k) != (1, 1, dim, length):
        return None
    index_k = parts.emit(aten.squeeze.dim, parts.emit(aten.transpose.int, k, 2, 3), 1)
    index_q = parts.emit(aten.transpose.int, q, 1, 2)
    return {"index_q": index_q, "index_k": index_k, "index_scale": scale}
