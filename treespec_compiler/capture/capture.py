"""Capture: one run of Dynamo, then functional pre-dispatch ATen.

docs/torch-api.md lists the private API of torch that this room uses; `TESTED_TORCH` is the range it was run on.
Dynamo traces the model, the backend exports, and the traced call is abandoned. The model itself is run only where it
has attributes that it filled by itself (`fills`).
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ..errors import Refusal, TreespecError, Unsupported
from ..ir.specs import EVERY_ROW, LogitsSpec
from ..logs import logger
from .call import CallSpec, call_module, logits_of, token_dim, tokens_of, vocabularies
from .control_flow import refuse_control_flow, where_specialised
from .fakes import forget_tensors
from .fills import as_it_was, on_copies, refillable, unfilled
from .flex import spell_flex_attention
from .found import finder, place
from .functional import functional_graph
from .inlined import inline_bodies
from .maps import mark_maps
from .mixers import mixers_of
from .quantized_weights import opened
from .reads import Reads
from .rewriting import Rewritten, rewritten, rewritten_for
from .state_changes import put_logits_first
from .surroundings import outside_autocast
from .tracing import tracing
from .weight_ref import WeightRef, registered

log = logger(__name__)

MOST_PLACES = 16  # where a trace takes other code, each of which begins it anew

TESTED_TORCH = ("2.11", "2.15")


@dataclass
class Capture:
    """A decoder as one functional pre-dispatch ATen graph over `tokens` [1, T] with T symbolic."""

    graph: fx.GraphModule
    tokens: str
    positions: list[str]
    weights: dict[str, WeightRef]
    length: sympy.Symbol
    example_length: int
    fake_mode: torch._subclasses.FakeTensorMode
    guards: list[sympy.Basic] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # weights that forward writes, in the order of outputs 1, 2, ...
    reads: Reads | None = None
    logits: LogitsSpec = EVERY_ROW
    kept: int = 0  # values of the tokens that forward sets as attributes


class _Captured(BaseException):
    """Thrown by the stand-in for compiled code: the graph is in hand, nothing needs to run."""


def capture(model: nn.Module, call: CallSpec) -> Capture:
    """Trace `model` at batch 1 with a dynamic number of tokens into functional pre-dispatch ATen.

    Raises `Unsupported` when Dynamo cannot make one graph of it, when the token dimension is specialised, or when the
    graph changes state.
    """
    tokens = tokens_of(call)
    if tokens.dim() not in (1, 2) or call.length < 2 or tokens.numel() != call.length:
        raise TreespecError(
            f"The example token ids have shape {list(tokens.shape)}, expected [1, T], [T, 1] or [T] with T >= 2."
        )
    traced: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced.update(_export(gm, inputs))
        return _abandon

    args, kwargs, roles = call.traced
    for key in (key for key, role in roles.items() if role in ("tokens", "positions")):
        value = args[int(key)] if key.isdigit() else kwargs[key]
        torch._dynamo.mark_dynamic(value, token_dim(value) if value is tokens else value.dim() - 1)
    forward = _fresh_forward(model, call.given)
    filled = refillable(model, call)
    try:
        with unfilled(filled):
            removed = _trace(model, call, forward, backend, traced)
            if not traced:
                raise Unsupported(
                    Refusal.CALL, "the model gave no graph: its forward runs no tensor operation on the token ids"
                )
            with opened(model):
                captured = _tidy(traced, model, call, call.length, forward.__globals__)
        unheld = {r.name: r.tensor for r in captured.weights.values() if r.owner is None and r.find is None}
        captured.reads = Reads(model, forward, unheld, removed, traced["code"], filled)
        return captured
    finally:
        if traced:
            forget_tensors(traced["mode"])
        traced.clear()  # Dynamo holds the backend as long as the guards, which outlive the capture
        for cell in forward.__closure__ or ():
            cell.cell_contents = None


def _trace(
    model: nn.Module, call: CallSpec, forward: types.FunctionType, backend: Callable[..., Any], traced: dict[str, Any]
) -> list[Rewritten]:
    """Run Dynamo on the call; returns the functions that it was traced with other code of."""
    args, kwargs, _ = call.traced
    # Another length of the same model stops at the same places.
    length, inherited = _REWRITTEN.get(model, (0, []))
    known = mixers_of(model)
    others = {each.function for each in known}
    removed = inherited = known + [each for each in inherited if not each.changed and each.function not in others]
    while True:
        try:
            with rewritten(removed), tracing(model, traced, call), opened(model), contextlib.suppress(_Captured):
                torch.compile(forward, backend=backend, fullgraph=True)(*args, **kwargs)
            return removed
        except Unsupported as refusal:
            if removed is inherited and len(removed) > len(known):
                if length != call.length:
                    raise  # a table may end before
                removed = known  # with other settings the places are others, or hold other tables
                continue
            if sum(len(each.lines) for each in removed) == MOST_PLACES:
                raise
            found = rewritten_for(refusal, removed, lambda n: _run(model, call.with_length(n)), call.length)
            if found is None:
                if refusal.kind is Refusal.SPECIALISED and _grows_with_tokens(call):
                    refusal.way_out = SUPPLY
                raise
            removed = found
            _REWRITTEN[model] = call.length, found


SUPPLY = (
    "give the example as a function of the token ids, which makes its arguments for any number of them: "
    "tree_program(model, example=lambda ids: (ids, table[: ids.shape[1]]))"
)


def _grows_with_tokens(call: CallSpec) -> bool:
    """Whether an argument of the example has as many elements somewhere as there are tokens."""
    values = {str(i): a for i, a in enumerate(call.args)} | call.kwargs
    others = (v for k, v in values.items() if call.roles.get(k) == "constant" and isinstance(v, Tensor))
    return call.given is None and any(call.length in v.shape for v in others)


_REWRITTEN: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[Rewritten]]] = weakref.WeakKeyDictionary()


def _run(model: nn.Module, call: CallSpec) -> None:
    """Run the model, which is as it was afterwards."""
    with as_it_was(model), on_copies(model), torch.inference_mode(False), torch.no_grad(), outside_autocast():
        call_module(model, *call.args, **call.kwargs)


def _fresh_forward(model: nn.Module, given: Callable[[Tensor], Any] | None) -> types.FunctionType:
    """`model.forward` returning only the logits, with a code object and globals of its own.

    Dynamo keeps its cache on the code object; sharing one would let captures of several models count against each
    other's recompile limit, and clearing it would throw away the user's compiled code. Into the globals it puts what
    its guards need.
    """

    sizes = vocabularies(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        if given is not None:
            args, kwargs = given(args[0])
        return logits_of(call_module(model, *args, **kwargs), sizes)

    return types.FunctionType(run.__code__.replace(), dict(run.__globals__), "treespec_capture", None, run.__closure__)


def _abandon(*_: Any) -> Any:
    raise _Captured


def _export(gm: fx.GraphModule, inputs: list[Any]) -> dict[str, Any]:
    from torch._guards import TracingContext
    from torch._subclasses import FakeTensor

    inline_bodies(gm)
    spell_flex_attention(gm)
    mark_maps(gm)
    refuse_control_flow(gm)
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    # NOTE parameters arrive as real tensors; another mode than Dynamo's own would be "Mixing fake modes".
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) and not isinstance(a, FakeTensor) else a for a in inputs]
    sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
    graph, written = functional_graph(gm, inputs, fakes, mode)
    found = {"graph": graph, "written": written, "inputs": inputs, "sources": sources, "mode": mode}
    return found | {"code": tuple(context.traced_code)}


def _source_name(node: fx.Node) -> str:
    arg = node.meta.get("grapharg")
    source = getattr(arg, "source", None)
    try:
        return source.name() if callable(source.name) else str(source.name)  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        return node.name


def _tidy(
    traced: dict[str, Any], model: nn.Module, call: CallSpec, example_length: int, names: dict[str, Any]
) -> Capture:
    """Name the placeholders: token ids, positions, weights; no SymInt placeholder is left.

    `names` are the globals of the traced function.
    """
    gm: fx.GraphModule = traced["graph"]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known = registered(model)
    tokens: fx.Node | None = None
    positions: list[str] = []
    weights: dict[str, WeightRef] = {}
    sizes: list[fx.Node] = []
    args, kwargs, roles = call.traced
    given = {id(v): roles[str(i)] for i, v in enumerate(args) if str(i) in roles}
    given |= {id(v): roles[k] for k, v in kwargs.items() if k in roles}
    by_source = {f"L['kwargs']['{k}']": role for k, role in roles.items()}
    by_source |= {f"L['args'][{k}]": role for k, role in roles.items() if k.isdigit()}
    for node, value, source in zip(placeholders, traced["inputs"], traced["sources"], strict=True):
        if not isinstance(value, Tensor):
            sizes.append(node)
            continue
        role = given.get(id(value)) or by_source.get(source)
        if role == "tokens":
            tokens = node
        elif role == "positions":
            positions.append(node.name)
        else:
            name, table, key = known.get(id(value), (source, None, ""))
            find = finder(source, model, value, names) if table is None else None
            listed = find is not None and place(source, model) is not None
            weights[node.name] = WeightRef(name, value, table, key, find, listed)
    if tokens is None:
        raise Unsupported(Refusal.CALL, "the graph does not read the token ids")
    length = tokens.meta["val"].shape[token_dim(tokens_of(call))]
    if not isinstance(length, torch.SymInt) or not isinstance(length.node.expr, sympy.Symbol):
        raise Unsupported(
            Refusal.SPECIALISED,
            f"the number of tokens was specialised to {length} during the trace: the model treats it as a constant",
            source=where_specialised(traced["mode"]),
            way_out="use torch ops on x.shape[1] instead of int()/len() or a table of fixed length",
        )
    written: list[str] = traced["written"]
    kept = put_logits_first(gm, written, weights, tokens)
    gm.graph.eliminate_dead_code()
    _one_text(gm, tokens, length, traced["mode"])
    _replace_sizes(gm, tokens, sizes, length.node.expr)
    mode = traced["mode"]
    guards = [g.expr for g in mode.shape_env.guards] if mode.shape_env is not None else []
    bounds = _bounds(mode, length, guards)
    output: Any = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    shape = [s.node.expr if isinstance(s, torch.SymInt) else s for s in output.args[0][0].meta["val"].shape]
    return Capture(
        gm,
        tokens.name,
        positions,
        weights,
        length.node.expr,
        example_length,
        mode,
        bounds,
        written,
        logits=LogitsSpec.of(shape, length.node.expr),
        kept=kept,
    )


def _one_text(gm: fx.GraphModule, tokens: fx.Node, length: torch.SymInt, mode: Any) -> None:
    """Token ids come as [1, T], whatever the model takes."""
    given: Any = tokens.meta["val"]
    if given.dim() == 2 and given.shape[0] == 1:
        return
    with mode:
        tokens.meta["val"] = given.new_empty(1, length)
    target = torch.ops.aten.select.int if given.dim() == 1 else torch.ops.aten.transpose.int
    with gm.graph.inserting_after(_last_placeholder(gm)):
        as_taken = gm.graph.call_function(target, (tokens, 0, 0) if given.dim() == 1 else (tokens, 0, 1))
    as_taken.meta["val"] = given
    tokens.replace_all_uses_with(as_taken, delete_user_cb=lambda user: user is not as_taken)


def _bounds(mode: Any, length: torch.SymInt, guards: list[sympy.Basic]) -> list[sympy.Basic]:
    """The guards on the number of tokens; bounds that the ShapeEnv folded into its ranges are added back."""
    symbol = length.node.expr
    # NOTE a positions argument has a symbol of its own until `Eq(tokens, positions)` makes them one.
    same = (mode.shape_env.replace(g) for g in guards)
    found = [g for g in same if symbol in g.free_symbols]
    bounds = mode.shape_env.var_to_range.get(symbol)
    if bounds is not None:
        if isinstance(bounds.upper, sympy.Integer) and bounds.upper < 2**62:
            found.append(symbol <= bounds.upper)
        if isinstance(bounds.lower, sympy.Integer) and bounds.lower > 2:
            found.append(symbol >= bounds.lower)
    return list(dict.fromkeys(found))


def _replace_sizes(gm: fx.GraphModule, tokens: fx.Node, sizes: list[fx.Node], length: sympy.Symbol) -> None:
    """SymInt placeholders become `sym_size(tokens, 1)`, so T is read off the token ids alone."""
    for node in sizes:
        if node.users:
            value = node.meta["val"]
            if not isinstance(value, torch.SymInt) or value.node.expr != length:
                raise Unsupported(
                    Refusal.CALL, f"the graph takes a number that is not the number of tokens: {value}", node=node.name
                )
            with gm.graph.inserting_after(_last_placeholder(gm)):
                size = gm.graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()


def _last_placeholder(gm: fx.GraphModule) -> fx.Node:
    return [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
