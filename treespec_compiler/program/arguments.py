"""What callers of a tree program pass, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..errors import ContextOverflow, HiddenStart, InvalidOption, InvalidTree, InvalidWeight, TokenOutOfRange
from ..ir.specs import Limit
from ..tree import TokenTree
from .batch import Part
from .cache import TreeCache


def check_tokens(tokens: Sequence[int], vocab: int, slot: int | None = None) -> None:
    """Raises `TokenOutOfRange` for an id that the model's table of `vocab` rows does not have.

    They are those of the tree of this slot; None: of the prompt.
    """
    if max(tokens) >= vocab or min(tokens) < 0:
        index = next(i for i, t in enumerate(tokens) if not 0 <= t < vocab)
        where = "the prompt" if slot is None else f"the tree of slot {slot}"
        raise TokenOutOfRange(token=tokens[index], index=index, vocab_size=vocab, where=where)


def check_start(tokens: Sequence[int], hidden: Collection[int], slot: int | None = None) -> None:
    """Raises `HiddenStart` where a text would begin with one of these tokens, which the model hides from all others.

    `tokens`: those that may be its first.
    """
    if hidden and (found := next((t for t in tokens if t in hidden), None)) is not None:
        raise HiddenStart(token=found, where="the prompt" if slot is None else f"the tree of slot {slot}")


def check_context(length: int, most: int | None, limits: Sequence[Limit]) -> None:
    """Raises `ContextOverflow` for a sequence of more tokens than there may be; `limits` as a program's."""
    if most is not None and length > most:
        raise ContextOverflow(position=length - 1, max_context=most, why=limits[0].reason)


def check_parts(
    parts: Sequence[Part],
    cache: TreeCache,
    vocab: int,
    most: int | None,
    limits: Sequence[Limit],
    hidden: Collection[int] = (),
) -> None:
    """Their tokens are the model's, none of those in `hidden` begins a text, and there is room for them."""
    for part in parts:
        slot, tree = part.slot, part.tree
        check_tokens(tree.tokens, vocab, slot)
        if hidden and not cache._lengths[slot]:
            check_start([t for t, parent in zip(tree.tokens, tree.parents, strict=True) if parent < 0], hidden, slot)
        check_context(cache._lengths[slot] + max(tree.depths) + 1, most, limits)
        cache._reserve(slot, len(tree.tokens))


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


def check_call(cache: object, device: torch.device) -> None:
    """Raises `InvalidOption` for anything else than a tree cache, `InvalidWeight` for weights without values."""
    if not isinstance(cache, TreeCache):
        raise InvalidOption(
            name="cache", got=type(cache).__name__, expected="a TreeCache", fix="Use program.new_cache()."
        )
    if device.type == "meta":
        got, fix = "weights on the meta device", "Load the model's weights; without them it can only be converted."
        raise InvalidWeight(got=got, expected="numbers to compute with", fix=fix)


def check_cache_sizes(max_tokens: int, slots: int, page_size: int | None, pages: int | None) -> None:
    """Raises `InvalidOption` for sizes that no cache has."""
    wanted = {"max_tokens": max_tokens, "slots": slots}
    wanted |= {} if page_size is None else {"page_size": page_size}
    wanted |= {} if pages is None else {"pages": pages}
    for name, value in wanted.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidOption(name=name, got=value, expected="a positive integer")
    if pages is not None and page_size is None:
        raise InvalidOption(name="pages", got=pages, expected="None, or a page_size beside it")
