"""The nodes of a call that reads states, in blocks: what is computed at once by the recurrences in ATen's ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from treespec_compiler.ir.state_requests import RequestRows

from .aten import topology

BLOCK = 64
"""Nodes of a chain that are computed together: the work grows with the square."""

MOST = 2**23
"""Numbers of pairs of nodes that are held at a time: where there are more, rows are computed in groups."""


@dataclass(frozen=True)
class NodeBlock:
    """n nodes of one request, behind m that were run in earlier calls of its step."""

    here: slice
    """Of the call's nodes."""
    old: Tensor
    """[m], rows of the stash."""
    own: Tensor
    """[n], rows of the stash."""
    seen: Tensor
    """[n, m + n], bool: the ancestors of each and itself."""
    ends: bool
    """Nothing of the request comes after it."""


def node_blocks(request: RequestRows, ancestors: Tensor) -> Iterator[NodeBlock]:
    """All nodes of a request; a chain with nothing of its step before it, which may be long, in blocks.

    `ancestors` is the call's [nodes, words]; a chain's has no words.
    """
    whole = not ancestors.shape[1] and not request.old
    size = BLOCK if whole else request.end - request.begin
    first = request.nodes - request.end
    for at in range(request.begin, request.end, size):
        end = min(at + size, request.end)
        path = ancestors.new_empty(end - at, 0) if whole else ancestors[at:end]
        seen = topology(path, request.old + end - at).bool()
        old, own = request.rows[: request.old], request.rows[first + at : first + end]
        yield NodeBlock(slice(at, end), old, own, seen, end == request.end)
