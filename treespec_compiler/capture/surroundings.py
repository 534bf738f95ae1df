"""What is set around a trace, and around the questions whether it would be another one now."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch

from .placement_hooks import hooks_that_leave

P = ParamSpec("P")
R = TypeVar("R")


def not_traced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which Dynamo calls as it is where a compiled function of the user's does: it is no tensor code."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # nothing is traced, and its import takes longer than many a call
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # as `torch.compiler.disable` marks a function
    return call


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Conversions and programs are those of the model itself: an autocast around them is left aside."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """`nn.TransformerEncoder` and its like as what they compute.

    Their fused op is not taken apart by anybody; and they look whether the values of a mask are causal, only to take a
    shortcut that means the same: a trace cannot look, and the mask is proved later. Loggers that forward asks for are
    found, not traced.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mock.patch.object(torch.nn.modules.transformer, "_detect_is_causal_mask", _as_told),
            mock.patch.object(logging, "getLogger", torch.compiler.assume_constant_result(_logger)),
            hooks_that_leave(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


_find_logger = logging.getLogger


def _logger(name: str | None = None) -> logging.Logger:
    """A logger, found while tracing: what is said to it is left out."""
    return _find_logger(name)


def _as_told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """torch's own answer where it is told one, and no shortcut otherwise."""
    return bool(is_causal)
