"""`treespec::commit_path`: move the accepted nodes' K/V to the end of the committed prefix, outside any graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

SCHEMA = "(Tensor(a!)[] pools, Tensor src, Tensor dst) -> ()"
TAGS = (torch.Tag.pt2_compliant_tag,)


def reference(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Token dst[j] of every site and head of every pool becomes token src[j].

    Each pool [sites, pages, H, page_size, D], with sites, H and D of its own; src and dst are int64 token indices,
    page * page_size + offset. Both increase and dst[j] <= src[j], so copying in order never overwrites a token that is
    still to be read.
    """
    for pool in pools:
        size = pool.shape[3]
        pool[:, dst // size, :, dst % size] = pool[:, src // size, :, src % size]  # the right side is a copy


def fake(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    return None


_library = torch.library.Library("treespec", "FRAGMENT")
_library.define("commit_path" + SCHEMA, tags=TAGS)
_library.impl("commit_path", reference, "CompositeExplicitAutograd")
torch.library.register_fake("treespec::commit_path", fake, lib=_library)

commit_path: OpOverload = torch.ops.treespec.commit_path.default
