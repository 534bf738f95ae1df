"""A head's layer run as in decoding, from every root of a text at once: EAGLE-3's "training-time test".

Li et al., arXiv 2503.01840, section 3.1. At depth 0 the layer reads the target's hidden states at every place. At depth
d > 0 it stands d places behind its root and reads what its kind of head has there; it attends to the places up to its
root and to its own depths in between, as the nodes of a chain do in decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..speculation.drafts.heads.eagle3 import Eagle3
from .texts import WrittenText


def unrolled(
    head: Eagle3,
    embedding: Tensor,
    text: WrittenText,
    depth: int,
    inner: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> Iterator[Tensor]:
    """Logits [R - d, draft vocabulary] at depths d = 0, 1, ..., a row for each root that the text goes on behind.

    `embedding` [ids, h] is of the target's ids; `inner(d, outputs)` gives what is read at depth d > 0 in place of an
    embedding and of fused hidden states [R - d, h], from the outputs [R - d, h] at the depth before.
    """
    roots = text.roots
    first = text.prompt - 1  # a root's place is that of the token before it
    places = first + roots
    embedded = embedding[text.tokens[1 : places + 1]]
    at = torch.arange(places, device=embedded.device)
    q, k, v, beside = head.projected(embedded, head.fused(text.hidden[:places]), at)
    seen = torch.ones(places, places, dtype=torch.bool, device=q.device).tril()[first:]
    normed, output = head.attended(q[:, first:], k, v, seen, beside[first:])
    yield head.logits(normed)
    for d in range(1, min(depth, roots)):
        rows = roots - d
        new_q, new_k, new_v, beside = head.projected(*inner(d, output[:rows]), at[first : first + rows] + d)
        own = torch.eye(rows, rows, dtype=torch.bool, device=q.device)
        seen = torch.cat([seen[:rows], own], 1)
        k, v = torch.cat([k, new_k], 1), torch.cat([v, new_v], 1)
        normed, output = head.attended(new_q, k, v, seen, beside)
        yield head.logits(normed)
