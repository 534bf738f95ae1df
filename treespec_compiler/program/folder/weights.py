"""Weights of a compiled folder: every tensor as the graph reads it, once, in one file that is mapped and not read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...ir.weights import Arange, Expression, Slice, Source, Transpose
from ...passes.framework.weights import Weights
from ..saved.values import CannotLoad, CannotSave
from .manifest import LARGEST

MADE = "made:"
"""Begins the names of tensors that are none of the model's own."""
ALIGNMENT = 64
"""Bytes that tensors of a file lie at multiples of: a vector, and a line of the cache."""
_PADDING = "padding:"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def rehoused(weights: Weights) -> tuple[dict[str, Expression], dict[str, Tensor]]:
    """Expressions over tensors that need no building, and those tensors by name. Raises CannotSave.

    Views of a tensor of the model stay views of it; what is joined, packed or computed is a tensor of its own.
    """
    made: dict[str, Expression] = {}
    tensors: dict[str, Tensor] = {}
    known: dict[tuple[object, ...], str] = {}

    def held(name: str, tensor: Tensor) -> str:
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
            raise CannotSave(f"{name}, a tensor of {tensor.dtype} without numbers in rows")
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        first = known.setdefault(place, name) if tensor.numel() else name
        tensors.setdefault(first, tensor.detach())
        return first

    def of(name: str, expression: Expression) -> Expression:
        if isinstance(expression, Source):
            return replace(expression, name=held(expression.name, weights.read(expression.name)))
        if isinstance(expression, Arange):
            return expression
        if isinstance(expression, (Transpose, Slice)) and _is_view(expression):
            return replace(expression, of=of(name, expression.of))
        tensor = weights.tensor(name).contiguous()
        return Source.of(held(f"{MADE}{name}", tensor), tensor)

    for name, expression in weights.items():
        made[name] = of(name, expression)
    return made, tensors


def _is_view(made: Expression) -> bool:
    return isinstance(made, Source) or (isinstance(made, (Transpose, Slice)) and _is_view(made.of))


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written a tensor at a time: no second copy of all of them in memory. Raises OSError."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        for key, shape, dtype, size in (
            (name, list(tensor.shape), _DTYPES[tensor.dtype], tensor.numel() * tensor.element_size()),
            (f"{_PADDING}{len(header)}", [-end_of(end, tensor) % ALIGNMENT], "U8", -end_of(end, tensor) % ALIGNMENT),
        ):
            if size or key == name:
                header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for piece in _bytes(tensor):
                file.write(piece)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))


def end_of(begin: int, tensor: Tensor) -> int:
    return begin + tensor.numel() * tensor.element_size()


_PIECE = 1 << 24


def _bytes(tensor: Tensor) -> Iterator[Any]:
    """The numbers in order, some megabytes at a time."""
    if not tensor.numel():
        return
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE].cpu().numpy().data


def check_header(path: Path) -> None:
    """Raises CannotLoad for a header that no such file has, before anything of it is read."""
    with path.open("rb") as file:
        begin = file.read(8)
    length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
    if not 0 < length <= min(LARGEST, path.stat().st_size - 8):
        raise CannotLoad(f"a header of {length:,} bytes in {path.name}")


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, whose pages are read when they are used. Raises CannotLoad."""
    check_header(path)
    with safe_open(str(path), "pt") as file:
        names = [name for name in file.keys() if not name.startswith(_PADDING)]  # noqa: SIM118  (no mapping)
        return {name: file.get_tensor(name) for name in names}
