"""How packed weights lie in panels of 32 outputs, and what a form of storage is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 32
GROUP = 32
"""Values along k that share a step."""


@dataclass(frozen=True)
class StorageForm:
    """How a weight is stored. `encode` takes [32 p, K] and gives [p, blocks, width], or None where that loses a bit."""

    name: str
    dtype: torch.dtype
    k_block: int
    """Values of k in a block."""
    width: int
    """Elements of a block."""
    encode: Callable[[Tensor, Tensor | None], Tensor | None]
    """Its second argument: the headers of the blocks, [32 p, blocks, header] bytes, where the form has `header`."""
    decode: Callable[[Tensor], Tensor]
    """[p, blocks, width] -> [32 p, K] float32."""
    levels: tuple[int, bool] | None = None
    """Bits of a level, and whether a group has a minimum, where an `encoders.Encoder` may look for the groups."""
    header: int = 0
    """Bytes of a block that cannot be found from its values: they are known of a file (`ir.kept_blocks`), or not."""

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Of a packed weight [rows, columns]."""
        return (-(-rows // PANEL), columns // self.k_block, self.width)

    def takes(self, columns: int) -> bool:
        return columns % self.k_block == 0


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.int32) == b.view(torch.int32)


def by_panel(rows: Tensor) -> Tensor:
    """[32 p, K] -> [p, K, 32]."""
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def by_row(panels: Tensor) -> Tensor:
    """[p, K, 32] -> [32 p, K]."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])


def halves(numbers: Tensor, panels: int) -> Tensor:
    """One number a group [G, 1], float16 exactly -> [p, blocks, 64] bytes."""
    return numbers.half().view(panels, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8)


def numbers(part: Tensor) -> Tensor:
    """The inverse: [p, blocks, 64] bytes -> [p, blocks, 32] float32."""
    return part.contiguous().view(torch.float16).float()


def nibbles(q: Tensor, panels: int) -> Tensor:
    """0 .. 15 of groups [G, 32] -> [p, blocks, 512] bytes: a word an output for every eighth k, its first one low."""
    eighths = q.to(torch.int32).view(panels, PANEL, -1, 4, 8)
    words = eighths[..., 0].clone()
    for i in range(1, 8):
        words |= eighths[..., i] << 4 * i
    return words.permute(0, 2, 3, 1).contiguous().view(panels, -1, 4 * PANEL).view(torch.uint8)


def from_nibbles(part: Tensor) -> Tensor:
    """The inverse: [p, blocks, 512] bytes -> [p, blocks, 32 k, 32 outputs] float32."""
    words = part.contiguous().view(torch.int32).unflatten(2, (4, 1, PANEL))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=part.device).view(8, 1)
    return ((words >> shifts) & 15).flatten(2, 3).float()


def five_bits(q: Tensor, panels: int) -> Tensor:
    """0 .. 31 of [G, 32] -> [p, blocks, 640] bytes: a word of fifth bits an output, the first k's low; `nibbles`."""
    levels = q.to(torch.int32)
    high = (levels >> 4).view(panels, PANEL, -1, GROUP)
    words = high[..., 0].clone()
    for i in range(1, GROUP):
        words |= high[..., i] << i
    fifths = words.transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([fifths, nibbles(levels & 15, panels)], 2)


def from_five_bits(part: Tensor) -> Tensor:
    """The inverse: [p, blocks, 640] bytes -> [p, blocks, 32 k, 32 outputs] float32."""
    words = part[..., : 4 * PANEL].contiguous().view(torch.int32).unsqueeze(2)
    shifts = torch.arange(GROUP, dtype=torch.int32, device=part.device).view(GROUP, 1)
    return from_nibbles(part[..., 4 * PANEL :]) + ((words >> shifts) & 1) * 16.0


def rows_of(blocks: Tensor) -> Tensor:
    """[p, blocks, 32 k, 32 outputs] -> [32 p, K]."""
    return by_row(blocks.flatten(1, 2))
