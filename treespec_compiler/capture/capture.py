"""Capture: one run of Dynamo, then functional pre-dispatch ATen.

What touches private API of torch is in this file and in `functional`; `TESTED_TORCH` is the range it was run on.
The capture never executes the model: Dynamo traces it, the backend exports, and the traced call is abandoned.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ..errors import TreespecError, Unsupported
from .control_flow import refuse_control_flow, where_specialised
from .functional import functional_graph
from .state_changes import put_logits_first
from .tracing import tracing

log = logging.getLogger("treespec.capture")

TESTED_TORCH = ("2.11", "2.15")

# Length of the example prompt. Any length above 1 does: the dimension is dynamic and every guard on it is examined.
EXAMPLE_TOKENS = 11

ROLES = ("tokens", "positions", "constant")


@dataclass
class WeightRef:
    """A parameter, buffer or tensor attribute that the captured graph reads.

    `owner[key]` is where the module keeps it, so a replaced parameter is noticed; `owner` is None for a tensor that
    no module registers (a plain attribute or a closure).
    """

    name: str
    tensor: Tensor
    owner: dict[str, Any] | None = None
    key: str = ""


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


class _Captured(BaseException):
    """Thrown by the stand-in for compiled code: the graph is in hand, nothing needs to run."""


def original_module(model: nn.Module) -> nn.Module:
    """The user's module: unwraps `torch.compile(model)`; a module compiled in place is its own original."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def call_module(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module with its hooks, but never by code that `model.compile()` made."""
    return model._call_impl(*args, **kwargs)


def logits_of(output: Any) -> Any:
    """The logits in a model's output: `.logits`, `[0]`, or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    if isinstance(output, Mapping):
        if "logits" not in output:
            raise Unsupported(
                f"the model returns a mapping without logits: {', '.join(map(str, output))}",
                way_out="return the logits under the name 'logits', or the tensor alone",
            )
        return output["logits"]
    return output[0]


@dataclass(frozen=True)
class CallSpec:
    """How a model is called: positional and keyword arguments, and which of them carry tokens and positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: dict[str, str]  # "0", "1", ... for positional arguments, names for keywords

    def with_tokens(self, tokens: Tensor) -> CallSpec:
        """The same call with other token ids [1, T]; positions become 0..T-1."""

        def fill(key: str, value: Any) -> Any:
            role = self.roles.get(key)
            if role == "tokens":
                return tokens
            if role == "positions":
                steps = torch.arange(tokens.shape[-1], dtype=value.dtype, device=tokens.device)
                return steps.expand(value.shape[:-1] + steps.shape)
            return value

        args = tuple(fill(str(i), a) for i, a in enumerate(self.args))
        return CallSpec(args, {k: fill(k, v) for k, v in self.kwargs.items()}, self.roles)

    def with_length(self, length: int) -> CallSpec:
        """The same call with `length` example tokens."""
        tokens = _tokens_of(self)
        ids = torch.arange(length, device=tokens.device, dtype=tokens.dtype).remainder(2).unsqueeze(0)
        return self.with_tokens(ids)


def call_spec(model: nn.Module, example: Any = None, roles: Mapping[str, str] | None = None) -> CallSpec:
    """Work out how to call `model` with token ids only.

    `example`: a tensor of ids [1, T], a tuple of positional arguments, or a mapping of keyword arguments.
    `roles`: argument name (or position, as a string) -> "tokens" | "positions" | "constant".
    `use_cache=False` is passed where the signature has it (or takes anything, and the configuration has it): with a
    cache a window shorter than the model's can vanish from the trace.
    """
    signature = inspect.signature(model.forward)
    names = list(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example is None:
        example = torch.arange(EXAMPLE_TOKENS, device=device).remainder(2).unsqueeze(0)
    if isinstance(example, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = dict(example)
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cached = "use_cache" in names or (takes_any and hasattr(config, "use_cache"))
    if cached and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    if "return_dict" in names and "return_dict" not in kwargs and not takes_any:
        kwargs["return_dict"] = True
    found = _roles(args, kwargs, names, dict(roles or {}))
    return CallSpec(args, kwargs, found)


def _roles(args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], given: dict[str, str]) -> dict[str, str]:
    for key, role in given.items():
        if role not in ROLES:
            raise TreespecError(f"Role of argument {key!r}: got {role!r}, expected one of {', '.join(ROLES)}.")
    tensors = {str(i): a for i, a in enumerate(args) if isinstance(a, Tensor)}
    tensors |= {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    roles: dict[str, str] = {}
    for key in tensors:
        name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
        found: str | None = given.get(key, given.get(name))
        if found is None and name == "position_ids":
            found = "positions"
        if found is None and "tokens" not in roles.values() and "tokens" not in given.values():
            found = "tokens"
        roles[key] = found or "constant"
    if list(roles.values()).count("tokens") != 1:
        raise TreespecError(
            f"The example call has {list(roles.values()).count('tokens')} token arguments, expected exactly one. "
            "Say which argument holds the token ids: roles={'input_ids': 'tokens'}."
        )
    return roles


def capture(model: nn.Module, call: CallSpec) -> Capture:
    """Trace `model` at batch 1 with a dynamic number of tokens into functional pre-dispatch ATen.

    Raises `Unsupported` when Dynamo cannot make one graph of it, when the token dimension is specialised, or when the
    graph changes state.
    """
    tokens = _tokens_of(call)
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise TreespecError(f"The example token ids have shape {list(tokens.shape)}, expected [1, T] with T >= 2.")
    traced: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced.update(_export(gm, inputs))
        return _abandon

    dynamic = {key for key, role in call.roles.items() if role in ("tokens", "positions")}
    for key in dynamic:
        value = call.args[int(key)] if key.isdigit() else call.kwargs[key]
        torch._dynamo.mark_dynamic(value, value.dim() - 1)
    compiled = torch.compile(_fresh_forward(model), backend=backend, fullgraph=True)
    with tracing(model, traced), contextlib.suppress(_Captured):
        compiled(*call.args, **call.kwargs)
    if not traced:
        raise Unsupported("the model gave no graph: its forward runs no tensor operation on the token ids")
    return _tidy(traced, model, call, tokens.shape[1])


def _tokens_of(call: CallSpec) -> Tensor:
    key = next(k for k, role in call.roles.items() if role == "tokens")
    return call.args[int(key)] if key.isdigit() else call.kwargs[key]


def _fresh_forward(model: nn.Module) -> Callable[..., Any]:
    """`model.forward` returning only the logits, in a code object of its own.

    Dynamo keeps its cache on the code object; sharing one would let captures of several models count against each
    other's recompile limit, and clearing it would throw away the user's compiled code.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return logits_of(call_module(model, *args, **kwargs))

    return types.FunctionType(run.__code__.replace(), run.__globals__, "treespec_capture", None, run.__closure__)


def _abandon(*_: Any) -> Any:
    raise _Captured


def _export(gm: fx.GraphModule, inputs: list[Any]) -> dict[str, Any]:
    from torch._guards import TracingContext
    from torch._subclasses import FakeTensor

    refuse_control_flow(gm)
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    # NOTE parameters arrive as real tensors; another mode than Dynamo's own would be "Mixing fake modes".
    fakes = [mode.from_tensor(a) if isinstance(a, Tensor) and not isinstance(a, FakeTensor) else a for a in inputs]
    sources = [_source_name(n) for n in gm.graph.nodes if n.op == "placeholder"]
    graph, written = functional_graph(gm, inputs, fakes, mode)
    return {"graph": graph, "written": written, "inputs": inputs, "sources": sources, "mode": mode}


def _source_name(node: fx.Node) -> str:
    arg = node.meta.get("grapharg")
    source = getattr(arg, "source", None)
    try:
        return source.name() if callable(source.name) else str(source.name)  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        return node.name


def _registered(model: nn.Module) -> dict[int, tuple[str, dict[str, Any], str]]:
    """id of each parameter and buffer -> (qualified name, dict that holds it, key)."""
    found: dict[int, tuple[str, dict[str, Any], str]] = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    found.setdefault(id(value), (f"{prefix}.{key}".lstrip("."), table, key))
    return found


def _tidy(traced: dict[str, Any], model: nn.Module, call: CallSpec, example_length: int) -> Capture:
    """Name the placeholders: token ids, positions, weights; no SymInt placeholder is left."""
    gm: fx.GraphModule = traced["graph"]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    registered = _registered(model)
    tokens: fx.Node | None = None
    positions: list[str] = []
    weights: dict[str, WeightRef] = {}
    sizes: list[fx.Node] = []
    given = {id(v): call.roles[str(i)] for i, v in enumerate(call.args) if str(i) in call.roles}
    given |= {id(v): call.roles[k] for k, v in call.kwargs.items() if k in call.roles}
    by_source = {f"L['kwargs']['{k}']": role for k, role in call.roles.items()}
    by_source |= {f"L['args'][{k}]": role for k, role in call.roles.items() if k.isdigit()}
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
            name, table, key = registered.get(id(value), (source, None, ""))
            weights[node.name] = WeightRef(name, value, table, key)
    if tokens is None:
        raise Unsupported("the graph does not read the token ids")
    length = tokens.meta["val"].shape[1]
    if not isinstance(length, torch.SymInt) or not isinstance(length.node.expr, sympy.Symbol):
        raise Unsupported(
            f"the number of tokens was specialised to {length} during the trace: the model treats it as a constant",
            source=where_specialised(traced["mode"]),
            way_out="use torch ops on x.shape[1] instead of int()/len() or a table of fixed length",
        )
    written: list[str] = traced["written"]
    put_logits_first(gm, written, weights)
    _replace_sizes(gm, tokens, sizes, length.node.expr)
    mode = traced["mode"]
    guards = [g.expr for g in mode.shape_env.guards] if mode.shape_env is not None else []
    bounds = _bounds(mode, length, guards)
    return Capture(gm, tokens.name, positions, weights, length.node.expr, example_length, mode, bounds, written)


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
                raise Unsupported(f"the graph takes a number that is not the number of tokens: {value}", node=node.name)
            with gm.graph.inserting_after(_last_placeholder(gm)):
                size = gm.graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()


def _last_placeholder(gm: fx.GraphModule) -> fx.Node:
    return [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
