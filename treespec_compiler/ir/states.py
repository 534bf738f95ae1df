"""State that is not K/V: what its kinds are, and how a commit moves each.

A site has two tensors. `state` [slots, ..] is what the committed tokens of a slot left, of a fixed size however many
they are. `stash` [rows, width] has a row for every uncommitted node: what its descendants, and a commit that keeps the
node, read of it. No node has a state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from . import convolution, exponential_recurrence, recurrence
from .library import definition
from .private_torch import OpOverload
from .specs import StateSpec

CONVOLUTION, RECURRENCE, EXPONENTIAL = "convolution", "recurrence", "exponential recurrence"


@dataclass(frozen=True)
class StateKind:
    """A kind of state. `over_sequence` is the op over one whole sequence, `over_trees` the one over trees."""

    over_sequence: OpOverload
    over_trees: OpOverload
    operands: int
    """How many arguments, the first ones, both ops share; what else the first has ends the second's, too."""
    advance: Callable[[StateSpec, Tensor, Tensor], Tensor]
    """[sites, ..] after these nodes [sites, n, width] of one path were committed to [sites, ..]."""


KINDS: Mapping[str, StateKind] = {
    CONVOLUTION: StateKind(
        convolution.causal_convolution,
        convolution.tree_convolution,
        3,
        lambda spec, state, nodes: convolution.advance(state, nodes),
    ),
    RECURRENCE: StateKind(
        recurrence.recurrence,
        recurrence.tree_recurrence,
        5,
        lambda spec, state, nodes: recurrence.advance(state, nodes, spec.sizes[0]),
    ),
    EXPONENTIAL: StateKind(
        exponential_recurrence.exponential_recurrence,
        exponential_recurrence.tree_exponential_recurrence,
        6,
        lambda spec, state, nodes: exponential_recurrence.advance(
            state, nodes, spec.sizes[0], spec.sizes[1], bool(spec.sizes[2])
        ),
    ),
}

OVER_TREES = frozenset(kind.over_trees for kind in KINDS.values())


def kind_over_sequence(node: fx.Node) -> str | None:
    """The kind of a node that is such an op over one whole sequence."""
    return next((name for name, kind in KINDS.items() if node.target is kind.over_sequence), None)


def is_over_trees(node: fx.Node) -> bool:
    """Bound to a kernel or not."""
    return definition(node.target) in OVER_TREES


def advanced(spec: StateSpec, state: Tensor, nodes: Tensor) -> Tensor:
    """Of the sites of one shape [sites, ..], after nodes [sites, n, width] of one path were committed."""
    with torch.no_grad():
        return KINDS[spec.kind].advance(spec, state, nodes)
