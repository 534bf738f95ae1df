"""Dynamo's settings for a capture, and its failures as refusals that name the user's line."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from ..errors import Unsupported
from .broken_graphs import no_graph
from .control_flow import where_specialised


@contextlib.contextmanager
def tracing(model: nn.Module, traced: Mapping[str, Any]) -> Iterator[None]:
    """Dynamo's settings for a capture, and its failures as refusals that name the user's line."""
    config = torch._dynamo.config.patch(specialize_float=True, automatic_dynamic_shapes=False, suppress_errors=False)
    guard_log = logging.getLogger("torch._guards")
    level = guard_log.level
    try:
        guard_log.setLevel(logging.CRITICAL)  # a length that cannot be dynamic is a refusal here, with its own text
        with torch.no_grad(), config, _no_garbage_collection(), _unmarked_buffers(model):
            yield
    except Unsupported:
        raise
    except ConstraintViolationError as error:
        raise Unsupported(
            "the model treats the number of tokens as a constant: the trace specialised it",
            source=where_specialised(traced.get("mode")),
            way_out="use torch ops on x.shape[1] instead of int(), len() or a buffer of fixed length",
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = error.__cause__ if isinstance(error.__cause__, Unsupported) else None
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, Unsupported):
            cause = inner
        if cause is not None:
            raise cause from None
        raise no_graph(model, error) from error
    finally:
        guard_log.setLevel(level)


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
