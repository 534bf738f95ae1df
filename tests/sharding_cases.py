"""Placements by brute force: split tensors over ranks, put them together again, and run one op on the parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.passes.sharding.placements import PARTIAL, REPLICATED, Placement, Segment, Sharded, blocks
from treespec_compiler.passes.sharding.rule import Fit, with_arguments
from treespec_compiler.passes.sharding.table import op_of, rule_of


def parts(value: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    """What each rank holds of a value."""
    if placement == REPLICATED:
        return [value.clone() for _ in range(ranks)]
    if placement == PARTIAL:
        terms = [torch.randn_like(value) for _ in range(ranks - 1)]
        return [*terms, value - sum(terms)]
    assert isinstance(placement, Sharded)
    return [
        torch.cat([value.narrow(placement.dim, a, b - a) for a, b in blocks(placement, rank, ranks)], placement.dim)
        for rank in range(ranks)
    ]


def whole(held: Sequence[Tensor], placement: Placement) -> Tensor:
    """The value that the ranks hold parts of; they must agree on what several of them hold."""
    ranks = len(held)
    if placement == PARTIAL:
        return torch.stack(list(held)).sum(0)
    if placement == REPLICATED:
        assert all(torch.equal(held[0], other) for other in held)
        return held[0]
    assert isinstance(placement, Sharded)
    sizes = list(held[0].shape)
    sizes[placement.dim] = placement.size
    out = held[0].new_empty(sizes)
    seen: set[tuple[int, int]] = set()
    for rank, mine in enumerate(held):
        at = 0
        for start, stop in blocks(placement, rank, ranks):
            piece = mine.narrow(placement.dim, at, stop - start)
            if (start, stop) in seen:
                assert torch.equal(out.narrow(placement.dim, start, stop - start), piece)
            seen.add((start, stop))
            out.narrow(placement.dim, start, stop - start).copy_(piece)
            at += stop - start
        assert at == mine.shape[placement.dim]
    return out


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call on real tensors, as a node with values."""
    graph = fx.Graph()

    def placed(value: Tensor) -> fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: placed(a) if isinstance(a, Tensor) else a)
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = run(node, {n: n.meta["val"] for n in node.all_input_nodes})
    return node


def run(node: fx.Node, values: dict[fx.Node, Tensor], numbers: dict[str, Any] | None = None) -> Any:
    args, kwargs = with_arguments(node, numbers or {})
    args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def placements(value: Tensor, ranks: int) -> Iterator[Placement]:
    """Every way a value may lie: whole, as a sum, and cut along each dimension in one segment or in two."""
    yield REPLICATED
    if value.is_floating_point():
        yield PARTIAL
    for dim, size in enumerate(value.shape):
        cuts = [(Segment(size),), (Segment(size // 2), Segment(size - size // 2))]
        cuts.append((Segment(size // 2), Segment(size - size // 2, ranks)))
        for segments in cuts:
            cut = Sharded(dim, segments)
            if cut.fits(ranks):
                yield cut


def check(node: fx.Node, given: Sequence[Placement], ranks: int) -> Fit | None:
    """Run a call on parts as its rule says, and compare with the call on whole values; None: the rule has no answer."""
    op, rule = op_of(node, ranks), rule_of(node)
    assert rule is not None
    outcome = rule.fits(op, given)
    if outcome is None:
        return None
    held: dict[fx.Node, list[Tensor]] = {}
    for of, need in zip(op.operands, outcome.needs, strict=True):
        held[of] = parts(of.meta["val"], need, ranks)
    numbers = rule.numbers(op, outcome)
    found = [run(node, {of: values[rank] for of, values in held.items()}, numbers) for rank in range(ranks)]
    expected = node.meta["val"]
    if isinstance(expected, Tensor):
        assert_near(whole(found, outcome.gives), expected)  # type: ignore[arg-type]
    else:
        for i, (value, placement) in enumerate(zip(expected, outcome.gives, strict=True)):  # type: ignore[arg-type]
            assert_near(whole([f[i] for f in found], placement), value)
    return outcome


def check_all(node: fx.Node, ranks: int) -> list[Fit]:
    """Every combination of placements of the operands; the rule's answers, each of them checked."""
    op = op_of(node, ranks)
    each = [list(placements(of.meta["val"], ranks)) for of in op.operands]
    found = []
    for given in itertools.islice(itertools.product(*each), 3000):
        if any(g != REPLICATED for g in given):
            outcome = check(node, given, ranks)
            found += [outcome] if outcome is not None else []
    return found


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    if not got.is_floating_point():
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
