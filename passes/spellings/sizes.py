"""Sizes that a trace left in a roundabout form, such as T * T // T, and what follows from them."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.private_torch import enable_python_dispatcher
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from ..framework.state import GraphState
from ..guards.numeric import of_whole_numbers
from ..guards.regions import DECIDED


def spell_size(state: GraphState, node: fx.Node) -> bool:
    """Rewrite a size that is the number of tokens, computed in a roundabout way, to that; False for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt) or value.node.expr == state.length:
        return False
    plain = value.node.expr.replace(
        lambda e: type(e).__name__ == "FloorDiv", lambda e: sympy.floor(e.args[0] / e.args[1])
    )
    if plain != state.length and not (_lengths(state) and same_size(state, value.node.expr, state.length)):
        return False
    new = state.call(torch.ops.aten.sym_size.int, (state.node(state.tokens), 1), like=node)
    node.replace_all_uses_with(new)
    state.graph.erase_node(node)
    refresh(state, new)
    return True


def same_size(state: GraphState, a: Any, b: Any) -> bool:
    """Whether two sizes are the same for every number of tokens that the trace is for; of a few, each is looked at."""
    gap = a - b
    if gap == 0:
        return True
    few = _lengths(state) if not gap.free_symbols - {state.length} else ()
    if few:
        return all(gap.xreplace({state.length: sympy.Integer(n)}) == 0 for n in few)
    return bool(sympy.simplify(gap) == 0)


def _lengths(state: GraphState) -> tuple[int, ...]:
    """The numbers of tokens that the trace is for, where they are few; (): they are many."""
    return _inside(tuple(state.guards), state.length)


@functools.lru_cache(maxsize=64)
def _inside(guards: tuple[Any, ...], length: sympy.Symbol) -> tuple[int, ...]:
    functions = [of_whole_numbers(g, length) for g in guards]
    known = [f for f in functions if f is not None]
    if len(known) < len(functions):
        return ()
    if any(all(f(n) for f in known) for n in range(FEW, DECIDED + 1)):
        return ()
    return tuple(n for n in range(2, FEW) if all(f(n) for f in known))


FEW = 16


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
            value = _target(node)(*args, **kwargs)
        if _shapes(value) != _shapes(node.meta["val"]):
            node.meta["val"] = value
            stale.add(node)


def _target(node: fx.Node) -> Any:
    """NOTE a view is only legal for the strides of the trace, which may be others now."""
    view = op_name(node) in ("aten.view", "aten._unsafe_view") and node.target is not torch.ops.aten.view.dtype
    return torch.ops.aten.reshape.default if view else node.target


def _shapes(value: Any) -> list[str]:
    return [str(getattr(v, "shape", v)) for v in (value if isinstance(value, (list, tuple)) else [value])]
