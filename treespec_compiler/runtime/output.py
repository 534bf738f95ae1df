"""What `generate` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, int64, tensor

from .stats import Stats


@dataclass(frozen=True)
class GenerationOutput:
    sequences: Tensor
    """[1, prompt + new] int64, on the prompt's device (CPU for a list)."""
    stats: Stats


@dataclass(frozen=True)
class BatchOutput(GenerationOutput):
    """Of several prompts: `outs[i]` is what prompt i gives alone.

    `sequences` [prompts, longest] are padded on the right with the model's own padding or end token, or 0. `stats` are
    those of all together; its only times are of compilation and, as `step_seconds`, of everything else.
    """

    outputs: tuple[GenerationOutput, ...]

    @classmethod
    def of(cls, outputs: Sequence[GenerationOutput], padding: int, stats: Stats) -> BatchOutput:
        rows = [out.sequences[0].tolist() for out in outputs]
        longest = max(map(len, rows))
        padded = [row + [padding] * (longest - len(row)) for row in rows]
        return cls(tensor(padded, dtype=int64, device=outputs[0].sequences.device), stats, tuple(outputs))

    def __getitem__(self, index: int) -> GenerationOutput:
        return self.outputs[index]

    def __len__(self) -> int:
        return len(self.outputs)

    def __iter__(self) -> Iterator[GenerationOutput]:
        return iter(self.outputs)
