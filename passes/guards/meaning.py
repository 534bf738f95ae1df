"""When two analyses of a model are the same program: its sites, its masks, and its data graph op by op."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.library import arguments
from treespec_compiler.ir.specs import MaskSpec

from ..framework.state import GraphState

# Up to here it is looked at every pair of places what a pattern hides.
_DENSE = 2048


def same_program(a: GraphState, b: GraphState, reach: int | None) -> bool:
    """Whether both are the same program of at most `reach` tokens (None: any number)."""
    for state in (a, b):  # tables are compared by what is in them
        state.proved_from |= set(state.weights.derived)
    return meaning(a, reach) == meaning(b, reach)


def meaning(state: GraphState, reach: int | None = None) -> tuple[Any, ...]:
    """What must agree for two analyses to be the same program of at most `reach` tokens: sites, masks, and the data
    graph op by op."""
    names: dict[Any, int] = {}
    sizes: dict[Any, int] = {}

    def key(value: Any) -> Any:
        if hasattr(value, "op"):
            return ("%", names[value])
        if isinstance(value, (list, tuple)):
            return tuple(map(key, value))
        if isinstance(value, dict):
            return tuple((k, key(v)) for k, v in sorted(value.items()))
        return str(value)

    rows: list[Any] = []
    read = _read(state)
    for node in state.graph.nodes:
        if node not in read:
            continue  # such as a size that only a spelling which is gone asked for
        what: Any = str(node.target) if node.op == "call_function" else node.op
        if node.op == "placeholder":
            what = state.weights.label(node.name) or "input"
        elif node.op == "get_attr":
            what = _contents(getattr(state.gm, str(node.target)))
        args, kwargs = node.args, node.kwargs
        if node.target is ops.causal_attention:
            args, kwargs = _attention_args(node, reach), {}
        row = (node.op, what, key(args), key(kwargs))
        if isinstance(node.meta.get("val"), torch.SymInt) and node.op == "call_function":
            if row in sizes:
                names[node] = sizes[row]  # a size may be asked for once or twice
                continue
            sizes[row] = len(rows)
        names[node] = len(rows)
        rows.append(row)
    masks = tuple(
        (_within(s.mask, reach), s.scale, s.heads, s.kv_heads, s.softcap, s.bias, s.sinks, s.activation)
        for s in state.sites
    )
    return masks, tuple(rows), tuple(_contents(state.constants[name]) for name in state.weights.derived)


def _read(state: GraphState) -> set[Any]:
    """Every input, and the nodes that the output is computed from."""
    read: set[Any] = set()
    for node in reversed(state.graph.nodes):
        if node.op != "call_function" or node in read:
            read |= {node, *node.all_input_nodes}
    return read


def _attention_args(node: Any, reach: int | None) -> tuple[Any, ...]:
    """All arguments of a `treespec::causal_attention`, with its mask as it is for at most `reach` tokens."""
    call = arguments(node)
    mask = _within(MaskSpec(call["window"], None, call["chunk"], call["pattern"]), reach)
    return tuple((call | {"window": mask.window, "chunk": mask.chunk, "pattern": mask.pattern}).values())


def _within(mask: MaskSpec, reach: int | None) -> MaskSpec:
    """The mask on the first `reach` tokens: a window or chunk that holds them all hides nothing."""
    if reach is None:
        return mask
    if mask.pattern and reach <= _DENSE:
        places = torch.arange(reach)
        seen = MaskSpec(pattern=mask.pattern).visible(places[:, None], places)
        mask = replace(mask, pattern="" if bool((seen == (places[:, None] >= places)).all()) else mask.pattern)
    return replace(
        mask, window=0 if mask.window >= reach else mask.window, chunk=0 if mask.chunk >= reach else mask.chunk
    )


def _contents(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return id(value)
    data = repr((value.dtype, value.tolist())).encode()
    return hashlib.sha256(data).hexdigest()
