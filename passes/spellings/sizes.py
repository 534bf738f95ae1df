"""Sizes that a trace left in a roundabout form, such as T * T // T, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.private_torch import enable_python_dispatcher
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState


def spell_size(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a size that is the number of tokens, computed in a roundabout way, to that; False for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt) or value.node.expr == state.length:
        return False
    plain = value.node.expr.replace(
        lambda e: type(e).__name__ == "FloorDiv", lambda e: sympy.floor(e.args[0] / e.args[1])
    )
    if plain != state.length:
        return False
    new = state.call(torch.ops.aten.sym_size.int, (state.node(state.tokens), 1), like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    refresh(state, new)
    return True


def same_sizes(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape for two numbers of tokens."""
    return all(_at(a, tokens) == _at(b, tokens) for tokens in (7, 12))


def _at(node: fx.Node, tokens: int) -> list[Any]:
    return [s.xreplace(dict.fromkeys(s.free_symbols, sympy.Integer(tokens))) for s in shape_of(node)]


def refresh(state: GraphState, changed: fx.Node, skip: Collection[str] = ()) -> None:
    """Compute the shapes of what reads a node again, as far as they change; not those of ops called as in `skip`."""
    stale = {changed}
    for node in list(state.graph.nodes):
        if node.op != "call_function" or op_name(node) in skip or not stale & set(node.all_input_nodes):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with state.fake_mode, enable_python_dispatcher():
            value = node.target(*args, **kwargs)
        if _shapes(value) != _shapes(node.meta["val"]):
            node.meta["val"] = value
            stale.add(node)


def _shapes(value: Any) -> list[str]:
    return [str(getattr(v, "shape", v)) for v in (value if isinstance(value, (list, tuple)) else [value])]
