"""Dynamo's settings for a capture, and its failures as refusals that name the user's line."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..errors import Refusal, Unsupported
from .broken_graphs import FALLBACK, no_graph, specialised
from .call import CallSpec, call_module
from .scripted import scripts_as_python
from .surroundings import outside_autocast, plain_layers
from .torch_errors import TRACE_ERRORS, own_refusal

# What only tells somebody something: a trace leaves these calls out, wherever forward makes them.
_METHODS = ("debug", "info", "warning", "error", "critical", "exception", "log")
TELLING = {print, warnings.warn, *(getattr(logging.Logger, name) for name in _METHODS)}


@contextlib.contextmanager
def tracing(model: nn.Module, traced: Mapping[str, Any], call: CallSpec) -> Iterator[None]:
    """Dynamo's settings for a capture, and its failures as refusals that name the user's line."""
    config = torch._dynamo.config.patch(
        specialize_float=True,
        automatic_dynamic_shapes=False,
        suppress_errors=False,
        ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | TELLING,
        skip_nnmodule_hook_guards=False,  # hooks that are added later are noticed by guards (`reads`)
    )
    _refuse_disabled()
    try:
        with (
            torch.no_grad(),
            outside_autocast(),
            config,
            _unmarked_buffers(model),
            scripts_as_python(model),
            plain_layers(),
            _no_garbage_collection(),
            _stopped_where_specialised(),
            _quiet("torch._guards", "torch.fx.experimental.symbolic_shapes"),
            torch.compiler.set_stance("default"),  # one that the user set is for the user's own compilations
        ):
            yield
    except Unsupported:
        raise
    except TRACE_ERRORS as error:
        own = own_refusal(error)
        if own is not None:
            raise own from own.__cause__
        refusal = no_graph(model, error, traced.get("mode"))
        if refusal.kind is Refusal.RAISES and _runs(model, call):
            refusal.kind = Refusal.NO_GRAPH  # it was the trace that failed
        raise refusal from error


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without what loggers of torch say: a length that cannot be dynamic is a refusal here, with its own text."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


class _Specialised(Exception):
    """The number of tokens became a constant."""

    def __init__(self, stack: Any) -> None:
        self.real_stack = stack


@contextlib.contextmanager
def _stopped_where_specialised() -> Iterator[None]:
    """Stop a trace at the line that takes the number of tokens for a constant: nothing that follows is wanted.

    A trace that went on would unroll `for i in range(x.shape[1])` to its end.
    """
    set_ = ShapeEnv._set_replacement

    def stop(self: ShapeEnv, symbol: Any, value: Any, *rest: Any) -> None:
        if isinstance(value, sympy.Integer) and symbol_is_type(symbol, SymT.SIZE):
            stack = list(TracingContext.extract_stack())
            raise specialised(stack[-1] if stack else None) from _Specialised(stack)
        set_(self, symbol, value, *rest)

    with mock.patch.object(ShapeEnv, "_set_replacement", stop):
        yield


def _runs(model: nn.Module, call: CallSpec) -> bool:
    """Whether the model itself takes the call."""
    try:
        with torch.no_grad(), outside_autocast():
            call_module(model, *call.args, **call.kwargs)
    except Exception:  # the user's code may raise anything
        return False
    return True


def _refuse_disabled() -> None:
    """Where Dynamo is switched off the model just runs, and nothing was learnt of it."""
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        what = "Dynamo, which reads the model's code, is switched off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE)"
        raise Unsupported(Refusal.NO_GRAPH, what, way_out=f"switch it on for the conversion, {FALLBACK}")
    if torch._C._len_torch_dispatch_stack():
        what = "a torch dispatch mode is active around the conversion, and Dynamo traces nothing inside of one"
        raise Unsupported(Refusal.NO_GRAPH, what, way_out="convert the model outside of it: tree_program(model)")


@contextlib.contextmanager
def _unmarked_buffers(model: nn.Module) -> Iterator[None]:
    """Without the attributes that `nn.Buffer` gives to its tensors.

    Dynamo does not read them, and needs them where forward assigns such a buffer again.
    """
    marked = [b for b in model.buffers() if "_is_buffer" in vars(b)]
    try:
        for buffer in marked:
            del buffer._is_buffer  # type: ignore[attr-defined]
        yield
    finally:
        for buffer in marked:
            buffer._is_buffer = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A trace makes millions of objects that live until its end; looking for garbage among them takes 8 % of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
