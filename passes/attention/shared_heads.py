"""Keys and values with the same number of heads, as the cache holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..forms.closed_form import shape_of
from ..framework.state import GraphState

aten = torch.ops.aten


def with_equal_heads(
    state: GraphState, at: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """q, k, v [1, heads, T, D] with as many heads of keys as of values, where one number divides the other.

    One wide head of values (talking heads) makes one wide head of keys, of which each query reads its own part; else
    the heads that are fewer are repeated.
    """
    keys, values = (int(shape_of(x)[1]) for x in (k, v))
    if values == 1 and keys > 1 and shape_of(v)[-1] > shape_of(k)[-1]:
        q, k = _one_head(state, at, q, k)
    elif keys < values and values % keys == 0:
        k = state.call(aten.repeat_interleave.self_int, (k, values // keys, 1), like=at)
    elif values < keys and keys % values == 0:
        v = state.call(aten.repeat_interleave.self_int, (v, keys // values, 1), like=at)
    return q, k, v


def _one_head(state: GraphState, at: fx.Node, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
    """[1, Hq, T, D], [1, H, T, D] -> [1, Hq, T, H * D] with zeros for other heads, [1, 1, T, H * D]."""

    def emit(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return state.call(op, args, kwargs, like=at)

    queries, heads, width = int(shape_of(q)[1]), int(shape_of(k)[1]), int(shape_of(k)[-1])
    value = q.meta["val"]
    eye = emit(aten.eye.default, heads, dtype=value.dtype, device=value.device)
    own = emit(aten.repeat_interleave.self_int, eye, queries // heads, 0)
    own = emit(aten.reshape.default, own, [1, queries, 1, heads, 1])
    q = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, q, 3), own)
    q = emit(aten.reshape.default, q, [1, queries, -1, heads * width])
    k = emit(aten.reshape.default, emit(aten.transpose.int, k, 1, 2), [1, 1, -1, heads * width])
    return q, k
