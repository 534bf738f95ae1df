"""`treespec::commit_path`: move the accepted nodes' K/V to the end of the committed prefix, outside any graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

SCHEMA = "(Tensor(a!) pool, Tensor src, Tensor dst) -> ()"
TAGS = (torch.Tag.pt2_compliant_tag,)


def reference(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """Token dst[j] of every site and head becomes token src[j].

    pool [sites, pages, H, page_size, D]; src and dst are int64 token indices, page * page_size + offset. Both increase
    and dst[j] <= src[j], so copying in order never overwrites a token that is still to be read.
    """
    size = pool.shape[3]
    pool[:, dst // size, :, dst % size] = pool[:, src // size, :, src % size]  # the right side is a copy


def fake(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    return None


_library = torch.library.Library("treespec", "FRAGMENT")
_library.define("commit_path" + SCHEMA, tags=TAGS)
_library.impl("commit_path", reference, "CompositeExplicitAutograd")
torch.library.register_fake("treespec::commit_path", fake, lib=_library)

commit_path: OpOverload = torch.ops.treespec.commit_path.default
