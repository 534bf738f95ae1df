"""What each op with a state keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir.exponential_recurrence import state_size
from treespec_compiler.ir.library import arguments
from treespec_compiler.ir.provenance import layer_path, source_line
from treespec_compiler.ir.specs import StateSpec
from treespec_compiler.ir.states import CONVOLUTION, EXPONENTIAL, RECURRENCE, kind_over_sequence

from ..framework.state import GraphState


@dataclass(frozen=True)
class _Kept:
    """As the fields of `StateSpec`."""

    shape: tuple[int, ...]
    width: int
    dtype: torch.dtype
    formula: str
    sizes: tuple[int, ...] = ()


def state_specs(state: GraphState) -> list[StateSpec]:
    """Of every op with a state, in graph order."""
    found: list[StateSpec] = []
    for node in state.graph.nodes:
        kind = kind_over_sequence(node)
        if kind is not None:
            layer = layer_path(node) or ""
            kept = _KEPT[kind](fx.node.map_arg(arguments(node), lambda n: n.meta["val"]))
            name, source = f"{layer or kind}#{len(found)}", source_line(node) or ""
            found.append(StateSpec(index=len(found), kind=kind, name=name, layer=layer, source=source, **vars(kept)))
    return found


def _convolution(call: Mapping[str, Any]) -> _Kept:
    x: Tensor = call["x"]
    channels, lag, dilation, width = int(x.shape[1]), call["lag"], call["dilation"], call["weight"].shape[2]
    text = f"{width} taps, of the tokens {lag} to {lag - dilation * (width - 1)} before"
    spread = f", every {dilation}th" if dilation > 1 else ""
    return _Kept((lag, channels), channels, x.dtype, text + spread)


def _recurrence(call: Mapping[str, Any]) -> _Kept:
    k: Tensor = call["k"]
    v: Tensor = call["v"]
    (key_heads, key_dim), (heads, value_dim) = map(int, k.shape[2:]), map(int, v.shape[2:])
    rows = key_dim if call["decay"].dim() == 4 else 1
    width = key_heads * key_dim + heads * value_dim + heads * rows
    text = "S = exp(g) S + k w^T, w = " + ("v" if call["beta"] is None else "beta (v - exp(g) S^T k)")
    return _Kept((heads, key_dim, value_dim), width, v.dtype, text, (key_heads,))


def _exponential(call: Mapping[str, Any]) -> _Kept:
    k: Tensor = call["k"]
    v: Tensor = call["v"]
    (key_heads, key_dim), (heads, value_dim) = map(int, k.shape[2:]), map(int, v.shape[2:])
    width = key_heads * key_dim + heads * (value_dim + 2)
    text = "S = exp(g) S + exp(i) k [v, 1]^T, over exp(m), m = max(m + g, i)"
    shape = (heads, state_size(key_dim, value_dim))
    return _Kept(shape, width, v.dtype, text, (key_heads, key_dim, int(call["from_zero"])))


_KEPT: dict[str, Callable[[Mapping[str, Any]], _Kept]] = {
    CONVOLUTION: _convolution,
    RECURRENCE: _recurrence,
    EXPONENTIAL: _exponential,
}
