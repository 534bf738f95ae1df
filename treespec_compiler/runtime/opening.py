"""A model whose weights stay in files, opened by one process or by every rank of a mesh."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..checkpoints import hf
from ..checkpoints.recast import layout
from ..options import Options
from ..program.ranks import joined


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    dir: str | os.PathLike[str] | None = None,
    mesh: str | None = None,
) -> nn.Module:
    """A model whose weights stay in files: pages of them come into memory as they are read, and can be taken back.

    `folder`: a causal language model's, with config.json and safetensors, `hf:` in front of it or not. Where its
    weights have another dtype, they are written once, a piece of a tensor at a time, to a folder in `dir` (default:
    `offload` in the user's cache directory), and found there the next time. With option `offload` such a model may be
    larger than memory. Raises UnreadableModel, InvalidOption, `NoRoomForWeights`, and OSError where `dir` cannot be
    written.

    `mesh`, such as "tp=2" or "pp=2": every rank calls it, and a program with the same option `mesh` makes of the mapped
    weights this rank's slices alone, of the layers of its stage. Raises on all ranks, before weights are read, where
    one of them has other files (`RanksDiffer`), or none that can be read (`RankFailed` on the others).
    """
    wanted = Options(mesh=mesh).shape
    if wanted.ranks == 1:
        return hf.load(folder, dtype=dtype, dir=dir)
    ranks = joined(wanted)

    def look() -> str:
        where = hf.folder_of(folder)
        hf.check_folder(str(folder), where)
        return layout(where)

    ranks.agree({"files of weights": ranks.each(look), "dtype": str(dtype)})
    return ranks.each(lambda: hf.load(folder, dtype=dtype, dir=dir))
