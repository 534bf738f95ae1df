"""One spelling of experts that are run one after the other: rows split by their counts become one grouped matmul.

`x.split(counts)`, the i-th part through the i-th matrix, joined in the same order, is a grouped matmul whose groups end
where the running sum of the counts says. Counts of choices by a 0/1 matrix are a histogram of the choices, since topk
chooses no expert twice for a token. Whether the rows are sorted by those choices is for token locality to prove.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.grouped_linear import grouped_linear
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from .sizes import refresh

aten = torch.ops.aten

_SPLIT = "aten.split_with_sizes"
_ZEROS = ("aten.zeros", "aten.new_zeros", "aten.zeros_like")


def spell_counts(state: GraphState, node: fx.Node) -> bool:
    """Rewrite `scatter(zeros [T, E], 1, choices, 1).to(int).sum(0)` to a histogram of the choices."""
    if op_name(node) != "aten.sum" or list(argument(node, "dim") or ()) != [0] or argument(node, "keepdim"):
        return False
    marks, value = node.args[0], node.meta["val"]
    while op_name(marks) == "aten._to_copy":
        marks = marks.args[0]
    if op_name(marks) != "aten.scatter" or str(marks.target) != "aten.scatter.value" or value.dtype != torch.int64:
        return False
    base, dim, choices, mark = marks.args
    if op_name(base) not in _ZEROS or dim not in (1, -1) or mark != 1 or not _chosen_once(choices):
        return False
    experts = shape_of(marks)[1]
    if not experts.is_Integer or shape_of(_choice(choices).args[0])[1] != experts:
        return False
    ids = state.call(aten.reshape.default, (choices, [-1]), like=node)
    ids = state.call(aten._to_copy.default, (ids,), {"dtype": torch.float32}, like=node)
    counts = state.call(aten.histc.default, (ids, int(experts), 0, int(experts) - 1), like=node)
    counts = state.call(aten._to_copy.default, (counts,), {"dtype": torch.int64}, like=node)
    node.replace_all_uses_with(counts)
    state.graph.erase_node(node)
    return True


def _choice(node: Any) -> Any:
    return node.args[0]


def _chosen_once(node: Any) -> bool:
    """Whether `node` is the indices of a topk along dimension 1 of a matrix."""
    if node.target is not operator.getitem or node.args[1] != 1 or op_name(_choice(node)) != "aten.topk":
        return False
    topk: Any = _choice(node)
    return len(shape_of(topk.args[0])) == 2 and argument(topk, "dim") in (1, -1)


def spell_grouped(state: GraphState, node: fx.Node) -> bool:
    """Rewrite the `cat` that joins the experts' results to one `treespec::grouped_linear`; False if it is none."""
    found = _experts(node)
    if found is None:
        return False
    rows, weight, counts = found
    ends = state.call(aten.cumsum.default, (counts, 0), like=node)
    new = state.call(grouped_linear, (rows, weight, ends), like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    # NOTE another split by the same counts is rewritten when its own `cat` is reached.
    refresh(state, new, skip=(_SPLIT,))
    return True


def _experts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(rows, matrices [E, M, K], counts [E]) of a `cat` of linears of the parts of one split."""
    if op_name(node) != "aten.cat" or node.args[1] != 0:
        return None
    parts: Any = node.args[0]
    split = weight = None
    for i, part in enumerate(parts):
        if op_name(part) != "aten.linear" or argument(part, "bias") is not None:
            return None
        source, matrix = part.args[:2]
        if source.target is not operator.getitem or source.args[1] != i or not _is_row(matrix, i):
            return None
        if (split is not None and split is not source.args[0]) or (weight is not None and weight is not matrix.args[0]):
            return None
        split, weight = source.args[0], matrix.args[0]
    if split is None or weight is None or op_name(split) != _SPLIT or argument(split, "dim") != 0:
        return None
    counts = _counted(split.args[1])
    wanted = torch.Size([len(parts)])
    if counts is None or counts.meta["val"].shape != wanted or weight.meta["val"].shape[:1] != wanted:
        return None
    return (split.args[0], weight, counts) if weight.meta["val"].dim() == 3 else None


def _is_row(node: Any, i: int) -> bool:
    return op_name(node) == "aten.select" and tuple(node.args[1:]) == (0, i)


def _counted(sizes: Any) -> fx.Node | None:
    """The tensor whose elements the sizes are, in order and all of them."""
    counts = None
    for i, size in enumerate(sizes):
        if not isinstance(size, fx.Node) or op_name(size) != "aten.item" or not _is_row(size.args[0], i):
            return None
        element: Any = size.args[0]
        if counts is not None and element.args[0] is not counts:
            return None
        counts = element.args[0]
    return counts
