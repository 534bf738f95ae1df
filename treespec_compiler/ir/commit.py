"""`treespec::commit_path`: move the accepted nodes' K/V to the end of the committed prefix, outside any graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .library import COMPLIANT, define
from .private_torch import OpOverload

SCHEMA = "(Tensor(a!)[] pools, Tensor src, Tensor dst) -> ()"


def reference(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Token dst[j] of every site and head of every pool becomes token src[j].

    Each pool [sites, pages, H, page_size, D], with sites, H and D of its own; src and dst are int64 token indices,
    page * page_size + offset. No dst is a later src, so copying in order never overwrites a token that is still to be
    read: within a slot both increase and dst[j] is not behind src[j], and no page is of two slots' trees.
    """
    for pool in pools:
        size = pool.shape[3]
        pool[:, dst // size, :, dst % size] = pool[:, src // size, :, src % size]  # the right side is a copy


def fake(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    return None


commit_path: OpOverload = define("commit_path", SCHEMA, reference, fake, COMPLIANT)
