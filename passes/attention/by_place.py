"""What is added to the scores of keys that stand beside the tokens: numbers by the query's place, as a table.

ALiBi or a relative bias over a prompt and a text says how far a constant key is from a query, which a query's own place
decides. In a tree, each node reads the row of its place. That a row depends on nothing else is compared by value, at
many numbers of tokens up to the table's end, which bounds the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..forms.biases import LONGEST_BIAS
from ..forms.by_value import SampledValues, proved_up_to, same_bits
from ..forms.closed_form import shape_of
from ..forms.masks import HIDDEN
from ..forms.score_check import block, readable
from ..framework.state import GraphState
from .score_pack import ROWS, score_table

aten = torch.ops.aten

# A table that ends before this is none: a model is not converted for texts of a few tokens.
_LEAST = 64


def rows_by_place(state: GraphState, node: fx.Node, at: fx.Node) -> fx.Node | None:
    """[.., heads or 1, T, n] like `node`, numbers of places alone, read from a table; None: they are no such rows.

    Every number must leave its key visible: queries that see no constant have no softmax of them.
    """
    shape = shape_of(node)
    if len(shape) not in (2, 3, 4) or shape[-2] != state.length or not shape[-1].is_Integer:
        return None
    if not node.meta["val"].is_floating_point() or any(s != 1 for s in shape[:-3]):
        return None
    heads = int(shape[-3]) if len(shape) > 2 else 1
    state.proved_by(node)
    sampled = SampledValues(node, state.gm, state.tokens, state.constants, state.max_context)
    limit = readable(sampled, min(LONGEST_BIAS, sampled.ceiling))
    if limit < min(_LEAST, sampled.ceiling):
        return None
    made = score_table(state, node, ROWS, heads, limit, int(shape[-1]))
    table = made.function(state.constants)  # [limit, heads, n]
    sampled.ceiling = limit
    columns = torch.arange(int(shape[-1]))

    def holds(n: int) -> bool:
        rows = sampled.places(n)
        return same_bits(block(sampled, n, rows, columns).transpose(0, 1).contiguous(), table[rows])

    if not bool((table > HIDDEN).all()) or proved_up_to(sampled, holds) < limit:
        return None
    return _read(state, state.add_weight("score", made), len(shape), at)


def _read(state: GraphState, table: fx.Node, rank: int, at: fx.Node) -> fx.Node:
    """[limit, heads, n] -> [.., heads, T, n], row i that of place i."""

    def emit(op: Any, *args: Any) -> fx.Node:
        return state.call(op, args, {}, like=at)

    length = emit(aten.sym_size.int, state.node(state.tokens), 1)
    rows = emit(aten.transpose.int, emit(aten.slice.Tensor, table, 0, 0, length), 0, 1)
    if rank == 2:
        return emit(aten.squeeze.dim, rows, 0)
    return rows if rank == 3 else emit(aten.unsqueeze.default, rows, 0)
