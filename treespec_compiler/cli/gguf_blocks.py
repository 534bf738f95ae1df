"""What a GGUF file knows of its blocks and their values do not say: it is kept beside the tensors made of them.

Readers rename tensors and reorder rows (heads of rotated projections), so a matrix is known by its rows' first values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UnreadableModel
from ..ir.kept_blocks import Headers, keep
from ..ir.narrow import FORMS

HEADERS = {"Q4_K": ("q4_k", 0, 16, (0, 2)), "Q5_K": ("q5_k", 0, 16, (0, 2)), "Q6_K": ("q6_k", 192, 210, (16,))}
"""By GGUF's name of a type: the form, where the header lies in a block, and where steps in float16 lie in the header
(ggml-common.h, block_q4_K, block_q5_K and block_q6_K)."""


def keep_headers(name: str, model: nn.Module, file: Path) -> int:
    """Keep the headers of the file's blocks beside the model's float32 matrices; returns of how many. Raises
    UnreadableModel where a block's step is no number.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.dtype is torch.float32]
    wanted: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    found = 0
    for shape, headers, first in _blocks(name, file):
        if shape not in wanted:
            alike = [p for p in matrices if tuple(p.shape) == shape]
            wanted[shape] = [(p, _row_sums(p.detach()[:, : first.shape[1]])) for p in alike]
        theirs = _row_sums(first)
        by_sum, order = theirs.sort(stable=True)
        for parameter, ours in wanted[shape]:
            again, places = ours.sort(stable=True)
            if torch.equal(by_sum, again):
                rows = torch.empty_like(order)
                rows[places] = order
                keep(parameter, Headers(headers.form, headers.bytes[rows]))
                found += 1
    return found


def _blocks(name: str, file: Path) -> Iterator[tuple[tuple[int, ...], Headers, Tensor]]:
    """Of each matrix in such blocks: its shape, headers, and the values of every row's first block."""
    import gguf

    for tensor in gguf.GGUFReader(str(file)).tensors:
        known = HEADERS.get(tensor.tensor_type.name)
        if known is None or tensor.data.ndim != 2:
            continue
        form, start, stop, steps = known
        values, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        blocks = tensor.data.reshape(len(tensor.data), -1, size)
        assert values == FORMS[form].k_block
        headers = torch.from_numpy(blocks[..., start:stop].copy())
        for at in steps:
            if not headers[..., at : at + 2].contiguous().view(torch.float16).isfinite().all():
                problem = f"{tensor.name} with a block whose step is infinite or NaN"
                fix = "The file is damaged: load it again from where it came."
                raise UnreadableModel(name=name, problem=problem, expected="finite steps", fix=fix)
        first = gguf.quants.dequantize(blocks[:, 0], tensor.tensor_type)
        yield (len(blocks), blocks.shape[1] * values), Headers(form, headers), torch.from_numpy(first)


def _row_sums(rows: Tensor) -> Tensor:
    """[N, K] float32 -> [N]: a checksum of each row's bits."""
    factors = torch.randint(1 << 62, (rows.shape[1],), generator=torch.Generator().manual_seed(1)) | 1
    return (rows.contiguous().view(torch.int32).long() * factors).sum(1)
