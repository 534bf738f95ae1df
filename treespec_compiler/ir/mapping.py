"""`torch.vmap` in a captured graph: where a function is mapped over a dimension begins and ends.

Between `mapped` and `unmapped` of one level stand the ops of the function as they are for one of its calls. Nothing
runs them: normalize writes the function out over all calls at once (`passes/spellings/maps.py`).
"""

from __future__ import annotations

from torch import SymInt, Tensor

from .library import define


def mapped_reference(x: Tensor, dim: int, level: int) -> Tensor:
    """What the first call of the function is given of `x`."""
    return x.select(dim, 0).clone()


def mapped_fake(x: Tensor, dim: int, level: int) -> Tensor:
    return x.new_empty([s for i, s in enumerate(x.shape) if i != dim])


def unmapped_reference(x: Tensor, level: int, size: int | SymInt, dim: int) -> Tensor:
    """The results of `size` calls that all give `x`."""
    return x.unsqueeze(dim).expand(*x.shape[:dim], size, *x.shape[dim:]).clone()


def unmapped_fake(x: Tensor, level: int, size: int | SymInt, dim: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], size, *x.shape[dim:]])


mapped = define("mapped", "(Tensor x, int dim, int level) -> Tensor", mapped_reference, mapped_fake)
unmapped = define(
    "unmapped", "(Tensor x, int level, SymInt size, int dim) -> Tensor", unmapped_reference, unmapped_fake
)
