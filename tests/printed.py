"""Formulas printed as torch code and run: what generated kernels compute, without Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.codegen.printer import TORCH, Printer


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


_TORCH_NAMES: dict[str, Any] = {
    "__builtins__": {},
    "float": float,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "floor": torch.floor,
    "tanh": torch.tanh,
    "where": lambda c, a, b: torch.where(_tensor(c), a, b),
    "minimum": lambda a, b: torch.minimum(*torch.broadcast_tensors(_tensor(a), _tensor(b))),
    "maximum": lambda a, b: torch.maximum(*torch.broadcast_tensors(_tensor(a), _tensor(b))),
}


def torch_function(expr: Any, arguments: Sequence[Any], tables: Sequence[str] = ()) -> Callable[..., Tensor]:
    """A function of tensors for `arguments` (symbols) and for `tables` (names), in this order; broadcasts.

    A table is a tensor with a dimension for each index. Raises `Unprintable`.
    """
    readers = {name: (lambda *at, table=name: f"{table}[{', '.join(at)}]") for name in tables}
    text = Printer(TORCH, tables=readers).doprint(expr)
    names = [*(a.name for a in arguments), *tables]
    return eval(f"lambda {', '.join(names)}: {text}", dict(_TORCH_NAMES))
