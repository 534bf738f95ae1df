"""Weight expressions: what a weight input of a graph is made of.

A `Source` is one tensor of the model by its name; the others are made of expressions, so that joining, sharding and
packing compose: `Pack(Join((Shard(q, 0, rank, 2), Shard(k, 0, rank, 2))))`. Shape, dtype and device are known without
building. `build(read)` makes the tensor from a reader of sources: a module, a safetensors file, a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InvalidWeight

Read = Callable[[str], Tensor]
"""The tensor of a source, by the source's name."""


class Expression(Protocol):
    """How a tensor is made: `Source | Transpose | Join | Slice | Shard | Lone | Table | Arange`, and what
    `ir.stored_weights` adds: `Quantized | Dequantized | Pack`. Equal ones make equal tensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The expressions that it is made of."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that the tensor depends on, each once, in order."""

    def build(self, read: Read) -> Tensor:
        """The tensor, of `shape`, `dtype` and `device`; it may share memory with a source.

        Raises InvalidWeight where a source is not what the expression was made for.
        """


@dataclass(frozen=True)
class Source:
    """A tensor of the model. `stride` is part of what it is: code is compiled for a layout."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Source:
        """The source that `tensor` is read from under this name."""
        return cls(name, tuple(tensor.shape), tensor.dtype, tensor.device, tuple(tensor.stride()))

    @property
    def parts(self) -> tuple[Expression, ...]:
        return ()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, read: Read) -> Tensor:
        """The tensor itself, laid out anew where a reader gives it with other strides (a file has rows in order)."""
        tensor = read(self.name).detach()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise InvalidWeight(got=f"{self.name} as {kind(tensor.shape, tensor.dtype)}", expected=str(self))
        if tuple(tensor.stride()) == self.stride or not _dense(self.shape, self.stride):
            return tensor
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=tensor.device).copy_(tensor)

    def __str__(self) -> str:
        return f"{self.name} as {kind(self.shape, self.dtype)}"


class MadeOf:
    """What is made of other expressions."""

    @property
    def parts(self) -> tuple[Expression, ...]:
        raise NotImplementedError

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.sources))


@dataclass(frozen=True)
class OfOne(MadeOf):
    of: Expression

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return self.of.device

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Transpose(OfOne):
    """[K, N] -> [N, K]: a view."""

    def __post_init__(self) -> None:
        need(len(self.of.shape) == 2, self.of, "a matrix to transpose")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def build(self, read: Read) -> Tensor:
        return self.of.build(read).t()

    def __str__(self) -> str:
        return f"transpose({label(self.of)})"


@dataclass(frozen=True)
class Join(MadeOf):
    """Concatenation along `dim`, contiguous; one piece alone is that piece, contiguous."""

    pieces: tuple[Expression, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        if not self.pieces:
            raise InvalidWeight(got="no pieces", expected="at least one to join")
        first = self.pieces[0]
        need(0 <= self.dim < len(first.shape), first, f"a dimension {self.dim}")
        for piece in self.pieces:
            same = _without(piece.shape, self.dim) == _without(first.shape, self.dim) and piece.dtype == first.dtype
            need(same and piece.device == first.device, piece, f"{kind(first.shape, first.dtype)} but for {self.dim}")

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (*first[: self.dim], sum(p.shape[self.dim] for p in self.pieces), *first[self.dim + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def device(self) -> torch.device:
        return self.pieces[0].device

    @property
    def parts(self) -> tuple[Expression, ...]:
        return self.pieces

    def build(self, read: Read) -> Tensor:
        tensors = [piece.build(read) for piece in self.pieces]
        return (torch.cat(tensors, self.dim) if len(tensors) > 1 else tensors[0]).contiguous()

    def __str__(self) -> str:
        return f"join({', '.join(map(label, self.pieces))})"


@dataclass(frozen=True)
class Shard(OfOne):
    """Part `index` of `count` equal ones along `dim`, contiguous; never cut inside a `unit` (rows of one head)."""

    dim: int
    index: int
    count: int
    unit: int = 1

    def __post_init__(self) -> None:
        need(0 <= self.dim < len(self.of.shape), self.of, f"a dimension {self.dim}")
        if not (self.unit > 0 and 0 <= self.index < self.count):
            got = f"part {self.index} of {self.count} in units of {self.unit}"
            raise InvalidWeight(got=got, expected="0 <= index < count, and a positive unit")
        whole = self.of.shape[self.dim] % (self.unit * self.count) == 0
        need(whole, self.of, f"a size of dimension {self.dim} that {self.count} units of {self.unit} divide")

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.of.shape
        return (*size[: self.dim], size[self.dim] // self.count, *size[self.dim + 1 :])

    def build(self, read: Read) -> Tensor:
        size = self.shape[self.dim]
        return self.of.build(read).narrow(self.dim, self.index * size, size).contiguous()

    def __str__(self) -> str:
        return f"shard({label(self.of)}, dim {self.dim}, {self.index} of {self.count})"


@dataclass(frozen=True)
class Slice(OfOne):
    """What lies from `start` to `stop` along `dim`: a view."""

    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        need(0 <= self.dim < len(self.of.shape), self.of, f"a dimension {self.dim}")
        inside = 0 <= self.start < self.stop <= self.of.shape[self.dim]
        need(inside, self.of, f"{self.start} to {self.stop} in dimension {self.dim}")

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.of.shape
        return (*size[: self.dim], self.stop - self.start, *size[self.dim + 1 :])

    def build(self, read: Read) -> Tensor:
        return self.of.build(read).narrow(self.dim, self.start, self.stop - self.start)

    def __str__(self) -> str:
        return f"slice({label(self.of)}, dim {self.dim}, {self.start}:{self.stop})"


@dataclass(frozen=True)
class Lone(OfOne):
    """The tensor on the one rank that `holds` it and zeros on all others, so that the ranks' sum is the tensor."""

    holds: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def build(self, read: Read) -> Tensor:
        return self.of.build(read) if self.holds else torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        return f"lone({label(self.of)}, {'here' if self.holds else 'elsewhere'})"


@dataclass(frozen=True)
class Table(MadeOf):
    """Computed from other expressions by a function of their tensors, by name: slopes and biases of scores."""

    function: Callable[[Mapping[str, Tensor]], Tensor]
    inputs: tuple[tuple[str, Expression], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def parts(self) -> tuple[Expression, ...]:
        return tuple(expression for _, expression in self.inputs)

    def build(self, read: Read) -> Tensor:
        made = self.function({name: expression.build(read) for name, expression in self.inputs})
        if tuple(made.shape) != self.shape or made.dtype != self.dtype:
            raise InvalidWeight(got=f"a table of {kind(made.shape, made.dtype)}", expected=kind(self.shape, self.dtype))
        return made.detach().to(self.device)

    def __str__(self) -> str:
        return f"table({', '.join(label(e) for _, e in self.inputs)})"


@dataclass(frozen=True)
class Arange(MadeOf):
    """0, 1, .. size - 1, int64."""

    size: int
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64

    @property
    def parts(self) -> tuple[Expression, ...]:
        return ()

    def build(self, read: Read) -> Tensor:
        return torch.arange(self.size, device=self.device)

    def __str__(self) -> str:
        return f"count({self.size})"


def need(holds: bool, part: Expression, expected: str) -> None:
    if not holds:
        raise InvalidWeight(got=f"{label(part)} as {kind(part.shape, part.dtype)}", expected=expected)


def label(expression: Expression) -> str:
    return expression.name if isinstance(expression, Source) else str(expression)


def kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether every element has a place of its own and no place is left over, so that the layout can be made anew."""
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True
