"""Weight expressions that change how numbers are stored: rounded, read from another library's integers, packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .integers import form_of
from .kept_blocks import Headers, kept
from .linear import pack_weight
from .narrow import FORMS
from .panels import GROUP, PANEL
from .quantize import STORAGES, quantized
from .weights import Expression, Join, MadeOf, OfOne, Read, Shard, Slice, Source, label, need


@dataclass(frozen=True)
class Quantized(OfOne):
    """A float32 matrix rounded to a `storage`, whose blocks lie along `dim`: what a product sums over.

    `build` raises InvalidWeight where a value is not finite.
    """

    storage: str
    dim: int

    def __post_init__(self) -> None:
        matrix = len(self.of.shape) == 2 and self.of.dtype is torch.float32
        need(matrix, self.of, "a float32 matrix to round")
        whole = self.of.shape[self.dim] % FORMS[STORAGES[self.storage]].k_block == 0
        need(whole, self.of, f"whole blocks in dimension {self.dim}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def build(self, read: Read) -> Tensor:
        made = self.of.build(read)
        return quantized(made, self.storage) if self.dim else quantized(made.t(), self.storage).t().contiguous()

    def __str__(self) -> str:
        return f"{self.storage}({label(self.of)})"


@dataclass(frozen=True)
class Dequantized(MadeOf):
    """(q - zero) step, of integers `q` with a step and a zero for each block: what a library quantized weights to.

    `steps` and `zeros` have a number for each block, in every dimension; blocks are of equal size. No `zeros`: 0.
    """

    q: Expression
    steps: Expression
    zeros: Expression | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for each in self.parts[1:]:
            whole = len(each.shape) == len(self.q.shape) and each.shape == self.steps.shape
            whole = whole and all(n > 0 and size % n == 0 for size, n in zip(self.q.shape, each.shape, strict=True))
            need(whole and each.device == self.q.device, each, f"a number for each block of {label(self.q)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (self.q, self.steps) if self.zeros is None else (self.q, self.steps, self.zeros)

    def build(self, read: Read) -> Tensor:
        levels = self._levels(read)
        # NOTE as torchao's `dequantize_affine`: a product in the wider one of two dtypes, and rounded to `dtype` then
        return (levels * self._blocks(self.steps.build(read))).reshape(self.shape).to(self.dtype)

    def headers(self, read: Read) -> Headers | None:
        """What `ir.integers` has to know to store the integers themselves; None where they are not of that kind."""
        runs = self.shape[-1] // max(1, self.steps.shape[-1])
        if len(self.shape) != 2 or self.dtype is not torch.float32 or runs % GROUP:
            return None
        form = form_of(self._levels(read))
        if form is None:
            return None
        steps = self.steps.build(read).float()
        rows = steps.repeat_interleave(self.shape[0] // steps.shape[0], 0)
        blocks = rows.repeat_interleave(runs // GROUP, 1).unsqueeze(2).contiguous()
        return Headers(form, blocks.view(torch.uint8))

    def _levels(self, read: Read) -> Tensor:
        """q - zero. Every dimension is two: of blocks, and of the values in one."""
        pairs = [(n, size // n) for size, n in zip(self.shape, self.steps.shape, strict=True)]
        q = self.q.build(read).to(self.dtype).reshape([size for pair in pairs for size in pair])
        return q if self.zeros is None else q - self._blocks(self.zeros.build(read).to(self.dtype))

    @staticmethod
    def _blocks(numbers: Tensor) -> Tensor:
        return numbers.reshape([size for n in numbers.shape for size in (n, 1)])

    def __str__(self) -> str:
        return f"dequantized({label(self.q)})"


@dataclass(frozen=True)
class Pack(OfOne):
    """[N, K] -> [panels, K, 32] as `treespec::packed_linear` reads it, or in one of the narrower `FORMS`.

    `build` raises InvalidWeight where the form does not hold every value exactly.
    """

    form: str = "float32"

    def __post_init__(self) -> None:
        need(len(self.of.shape) == 2, self.of, "a matrix to pack")
        narrow = FORMS.get(self.form)
        if narrow is None:
            known = self.form == "float32"
            need(known, self.of, f"one of the forms {', '.join(FORMS)}, float32; got {self.form}")
        else:
            fits = self.of.dtype is torch.float32 and narrow.takes(self.of.shape[1])
            need(fits, self.of, f"float32 with columns in blocks of {narrow.k_block}")

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.of.shape
        narrow = FORMS.get(self.form)
        return narrow.shape(rows, columns) if narrow is not None else (-(-rows // PANEL), columns, PANEL)

    @property
    def dtype(self) -> torch.dtype:
        narrow = FORMS.get(self.form)
        return self.of.dtype if narrow is None else narrow.dtype

    def build(self, read: Read) -> Tensor:
        headers = headers_of(self.of, read) if self.form in FORMS and FORMS[self.form].header else None
        return pack_weight(self.of.build(read), self.form, None if headers is None else headers.bytes)

    def __str__(self) -> str:
        return f"pack({label(self.of)})" if self.form == "float32" else f"pack({label(self.of)}, {self.form})"


def headers_of(made: Expression, read: Read) -> Headers | None:
    """Those of the blocks of a matrix, where its sources have them, of one form (`ir.kept_blocks`)."""
    if isinstance(made, Source):
        return kept(read(made.name))
    if isinstance(made, Dequantized):
        return made.headers(read)
    if isinstance(made, Join) and made.dim == 0:
        parts = [headers_of(piece, read) for piece in made.pieces]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({part.form for part in known}) > 1:
            return None
        return Headers(known[0].form, torch.cat([part.bytes for part in known]))
    if not isinstance(made, (Slice, Shard)) or made.dim > 1 or (headers := headers_of(made.of, read)) is None:
        return None
    size = made.shape[made.dim]
    start = made.start if isinstance(made, Slice) else made.index * size
    return headers.narrowed(made.dim, start, start + size)
