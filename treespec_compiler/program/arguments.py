"""What callers of a tree program pass, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidTree, TokenOutOfRange
from ..tree import TokenTree
from .batch import Part
from .cache import TreeCache


def check_tokens(tokens: Sequence[int], vocab: int, where: str) -> None:
    """Raises `TokenOutOfRange` for an id that the model's table of `vocab` rows does not have."""
    if max(tokens) >= vocab or min(tokens) < 0:
        index = next(i for i, t in enumerate(tokens) if not 0 <= t < vocab)
        raise TokenOutOfRange(token=tokens[index], index=index, vocab_size=vocab, where=where)


def new_part(cache: TreeCache, slot: int, tree: TokenTree, start: int) -> Part:
    """Nodes `start ..` of a tree, of which the cache must hold the earlier ones uncommitted; raises `InvalidTree`."""
    if not isinstance(tree, TokenTree):
        raise InvalidTree(
            got=type(tree).__name__, expected="a TokenTree or a Forest", fix="Build TokenTree(tokens, parents)."
        )
    cache._check_slot(slot)
    if start:
        held = cache._trees[slot]
        known = 0 if held is None else len(held)
        if not isinstance(start, int) or not 0 < start < len(tree) or start > known:
            raise InvalidTree(
                got=f"start={start} for a tree of {len(tree)} nodes with {known} in the cache",
                expected=f"0 <= start <= {min(known, len(tree) - 1)}",
                fix="Run the earlier nodes first, with verify or extend.",
            )
        assert held is not None
        if held.tokens[:start] != tree.tokens[:start] or held.parents[:start] != tree.parents[:start]:
            raise InvalidTree(
                got=f"a tree whose first {start} nodes differ from those in the cache",
                expected="the same tree, grown at the end",
                fix="Extend the tree that was run, or call verify.",
            )
    return Part(slot, tree, start)
