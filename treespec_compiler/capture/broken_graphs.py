"""Models that give no single graph: what their code does at the line where the trace stopped, and what would help."""

from __future__ import annotations

import os
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..errors import Refusal, Unsupported
from .control_flow import where_specialised
from .placement_hooks import hooked

_HERE = os.path.dirname(__file__)
LOGITS = "return the logits alone, first, or under the name 'logits'"
FALLBACK = "or use on_unsupported='fallback'"
_EXPERTS = (
    "compute the experts on rows sorted by expert, with treespec.grouped_linear (docs/refusals.md shows it), "
    + FALLBACK
)

_DOES = {"for ": "loops over", "if ": "branches on", "elif ": "branches on", "while ": "branches on"}


def no_graph(model: nn.Module, error: BaseException, mode: Any = None) -> Unsupported:
    """The refusal for an error of Dynamo: the line, the submodule that it belongs to, and the way out.

    `mode`: the trace's fake mode, which remembers where a size was made a constant.
    """
    from .torch_errors import kind_of  # NOTE it imports Dynamo

    kind = kind_of(error)
    if kind is Refusal.SPECIALISED:
        return specialised(None, where_specialised(mode))
    frames = list(getattr(error, "real_stack", None) or [])
    frame = frames[-1] if frames else None
    if frame is not None and frame.name == "logits_of" and frame.filename.startswith(_HERE):
        what = "the model returns no logits: neither a tensor, nor one that comes first"
        return Unsupported(Refusal.CALL, what, way_out=LOGITS)
    line = (frame.line or "").strip() if frame is not None else ""
    layer, module = _module_at(model, frame) if frame is not None else (None, None)
    what, way_out = _first_line(error), f"remove the graph break (torch._dynamo.explain shows it), {FALLBACK}"
    if kind is Refusal.CONTROL:
        does = next((words for start, words in _DOES.items() if line.startswith(start)), "uses")
        what = f"its code {does} values that are known only when it runs"
        way_out = _without_the_loop(model) if does == "loops over" else f"compute it with tensors alone, {FALLBACK}"
    scripted = next((path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if kind is Refusal.NO_GRAPH and scripted is not None:
        way_out = f"convert the model with the Python module that {scripted} was scripted from, {FALLBACK}"
    if kind is Refusal.NO_GRAPH and hooked(model):
        way_out = f"take the hooks off: accelerate.hooks.remove_hook_from_module(model, recurse=True), {FALLBACK}"
    return Unsupported(
        kind,
        f"Dynamo cannot capture {type(model).__name__} as one graph: {what}",
        source=f"{frame.filename}:{frame.lineno}, in {frame.name}: {line}" if frame is not None else None,
        layer=layer,
        module=module,
        way_out=way_out,
    )


def specialised(frame: Any, source: str | None = None) -> Unsupported:
    """The refusal of a model for which the number of tokens is a constant, at the line of the frame."""
    if frame is not None:
        source = f"{frame.filename}:{frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"
    return Unsupported(
        Refusal.SPECIALISED,
        "the model treats the number of tokens as a constant: the trace specialised it",
        source=source,
        way_out="use torch ops on x.shape[1] instead of int(), len() or a buffer of fixed length; in a loop over "
        "pieces of the text, pieces as long as the longest text",
    )


def _without_the_loop(model: nn.Module) -> str:
    """A loop over the experts that were hit: transformers offers other implementations for most of its models."""
    settable = getattr(type(model), "_can_set_experts_implementation", None)
    if callable(settable) and settable():
        return f"model.set_experts_implementation('grouped_mm') computes the same without the loop; {FALLBACK}"
    return _EXPERTS


def _module_at(model: nn.Module, frame: Any) -> tuple[str | None, str | None]:
    """(path, class) of the first submodule one of whose methods holds the line."""
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            for method in vars(cls).values():
                code = getattr(_unwrapped(method), "__code__", None)
                if code is not None and _holds(code, frame):
                    return path or None, cls.__name__
    return None, None


def _unwrapped(method: Any) -> Any:
    """The user's function under decorators."""
    while not isinstance(method, FunctionType) or hasattr(method, "__wrapped__"):
        inner = getattr(method, "__wrapped__", None)
        if inner is None:
            break
        method = inner
    return method


def _holds(code: CodeType, frame: Any) -> bool:
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return code.co_filename == frame.filename and bool(lines) and min(lines) <= frame.lineno <= max(lines)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("raised:"):
        return lines[1]
    return lines[0] if lines else type(error).__name__
