"""strip native cache: a model's own K/V cache goes, and attention reads the keys and values of the new tokens.

A buffer that forward writes is a K/V cache when token t writes its cell `input_pos[t]` and nothing else does, and when
what is read back takes part in attention only. With positions 0 .. T-1 the first T cells are then the new tokens' own
keys and values, and the cells behind them are to be hidden by the mask. So every value that has a dimension of cells is
computed for the first T cells instead, masks included; that the masks hide all later cells follows when `classify`
proves them causal, for which every table they read must reach the end of the buffer. What is not proved is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.ir.provenance import layer_path, op_name, source_line
from treespec_compiler.ir.specs import Limit

from .attention.cells import Cells
from .forms.closed_form import ClosedForms, axis, shape_of
from .framework.manager import Pass
from .framework.state import GraphState, refuse

aten = torch.ops.aten

_WAY_OUT = "call it without its own cache (use_cache=False), or move the update out of forward"


@dataclass(frozen=True)
class Write:
    """`cache` [.., cells, ..] gets `value` at cells 0 .. T-1 of dimension `at`; `node` is the whole new contents."""

    cache: fx.Node
    node: fx.Node
    value: fx.Node
    at: int

    @property
    def cells(self) -> int:
        return int(shape_of(self.cache)[self.at])


def strip_cache(state: GraphState) -> int:
    """Strip every buffer that forward writes, and empty parts of concatenations; returns how many."""
    matches = _drop_empty_pasts(state)
    if not state.written:
        return matches
    forms = state.closed_forms()
    updates = state.output.args[0][1:]
    writes = [_write(state, forms, state.node(name), node) for name, node in zip(state.written, updates, strict=True)]
    state.output.args = ((state.logits,),)
    cells = Cells(state, forms)
    for write in writes:
        _strip(state, cells, write)
    cells.follow()
    state.graph.eliminate_dead_code()
    for write in writes:
        state.forget(write.cache.name)
    state.written = []
    return matches + len(writes)


def _drop_empty_pasts(state: GraphState) -> int:
    """`cat([past, new])` with a past of no tokens is `new`."""
    matches = 0
    for node in list(state.graph.nodes):
        if op_name(node) not in _JOINS:
            continue
        parts: Any = node.args[0]
        kept = [p for p in parts if sympy.Integer(0) not in shape_of(p)]
        if len(kept) == len(parts) or not kept or kept[0].meta["val"].dtype != node.meta["val"].dtype:
            continue
        if len(kept) > 1:
            node.args = (kept, *node.args[1:])
        elif shape_of(kept[0]) == shape_of(node):
            node.replace_all_uses_with(kept[0])
            state.graph.erase_node(node)
        else:
            continue
        matches += 1
    return matches


_JOINS = ("aten.cat", "aten.hstack", "aten.vstack")


def _changes_state(state: GraphState, cache: fx.Node, why: str, node: fx.Node | None = None) -> Unsupported:
    name = state.weights.label(cache.name) or cache.name
    return refuse(Refusal.STATE, f"the forward pass changes state in place: {name}; {why}", node, _WAY_OUT)


def _write(state: GraphState, forms: ClosedForms, cache: fx.Node, node: Any) -> Write:
    """The one write of a cache, proved to put token t's value into cell t."""
    if not isinstance(node, fx.Node) or node is cache or node.op != "call_function":
        raise _changes_state(state, cache, "what is written is not a K/V cache's update")
    at, value = _spelling(state, forms, cache, node)
    others = [user for user in cache.users if user is not node]
    if others:
        raise _changes_state(state, cache, f"{op_name(others[0])} reads it besides the write", others[0])
    shape = list(shape_of(cache))
    if not all(size.is_Integer for size in shape):
        raise _changes_state(state, cache, f"its shape {shape} is not fixed", node)
    wanted = [*shape[:at], state.length, *shape[at + 1 :]]
    lead = len(wanted) - len(shape_of(value))
    if wanted[lead:] != list(shape_of(value)) or any(size != 1 for size in wanted[:lead]):
        problem = f"a value of shape {list(shape_of(value))} is spread over its cells of shape {wanted}"
        raise _changes_state(state, cache, problem, node)
    if value.meta["val"].dtype != cache.meta["val"].dtype:
        raise _changes_state(state, cache, "the write converts the value to another dtype", node)
    return Write(cache, node, value, at)


def _spelling(state: GraphState, forms: ClosedForms, cache: fx.Node, node: fx.Node) -> tuple[int, fx.Node]:
    """(cell dimension, value written) of an indexed write at the tokens' positions."""
    args: Any = node.args
    name = op_name(node)
    if not args or args[0] is not cache:
        first = next((a for a in node.all_input_nodes if cache in a.all_input_nodes), node)
        raise _changes_state(state, cache, f"it is not one write: {op_name(first)}, then {name}", node)
    if name == "aten.index_put":
        used = [i for i, index in enumerate(args[1]) if index is not None]
        if len(used) != 1 or args[3]:
            raise _changes_state(state, cache, "the write adds up, or has several indices", node)
        at, index, value = used[0], args[1][used[0]], args[2]
    elif name == "aten.index_copy":
        at, index, value = int(args[1]) % len(shape_of(cache)), args[2], args[3]
    elif name == "aten.slice_scatter":
        at = int(args[2]) % len(shape_of(cache))
        if not _from_the_start(state, args[3:]):
            raise _changes_state(state, cache, "the slice that is written is not that of the tokens", node)
        return at, args[1]
    else:
        raise _changes_state(state, cache, f"{name} is not known as a cache's update", node)
    form = forms.of(index)
    if form is None or form.is_bool or form.shape != (state.length,) or form.expr != axis(0):
        found = "content of the tokens or of the cache" if form is None else f"index {form.expr}".replace("a0", "t")
        raise _changes_state(state, cache, f"token t does not write cell t: the write depends on {found}", node)
    return at, value


def _from_the_start(state: GraphState, bounds: Sequence[Any]) -> bool:
    """Whether (start, end, step) are (0, T, 1)."""
    start, end, step = bounds
    length = end.meta["val"].node.expr if isinstance(end, fx.Node) else end
    return start in (0, None) and length == state.length and step == 1


def _strip(state: GraphState, cells: Cells, write: Write) -> None:
    """Readers of the new contents get the new tokens' values, with T cells."""
    value = write.value
    if shape_of(value) != (*shape_of(write.cache)[: write.at], state.length, *shape_of(write.cache)[write.at + 1 :]):
        sizes = [int(s) for s in shape_of(write.cache)]
        whole: list[Any] = [*sizes[: write.at], cells.tokens, *sizes[write.at + 1 :]]
        value = state.call(aten.reshape.default, (value, whole), like=write.node)
    cells.replace(write.node, value, write.at, write.cells)
    where = layer_path(write.node) or source_line(write.node) or write.cache.name
    state.limits.append(Limit(write.cells, f"the model's own K/V cache at {where}"))


PASS = Pass(
    "strip native cache",
    strip_cache,
    before="normalized graph; outputs behind the logits are new contents of buffers",
    after="the logits are the only output; K and V are the new tokens' own",
    needs=("choose regime",),
)
