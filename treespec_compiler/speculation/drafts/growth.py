"""A draft's tree grows call by call: a plan says which nodes are run, their logits give them children."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Protocol

from ...errors import InvalidOption
from ...tree import TokenTree
from ..policies.protocol import ChoosingPolicy, TreePolicy
from ..proposal import Proposal
from ..slots import Slot
from ..work import Nodes, Working
from .children import Children


class Plan(Protocol):
    """Which nodes are run, in which call."""

    def wanted(self, call: int, proposal: Proposal) -> tuple[Sequence[int], Sequence[int]]:
        """Nodes to run next, in index order, and how many children each gets; none: the tree is ready.

        A range is all nodes that were not run yet, and every call's is one or none is.
        """
        ...

    def chosen(self, proposal: Proposal) -> Proposal:
        """What is to be verified."""
        ...


class OwnTree:
    """What a draft runs in a step: tokens it caught up, the last of them the root, and nodes of the proposal."""

    def __init__(self, slot: Slot, tokens: Iterable[int]) -> None:
        self.slot = slot
        self.tokens = [*tokens]
        self.chain = len(self.tokens)
        self.parents = [*range(-1, self.chain - 1)]
        self.run = 0
        """Nodes that were run."""
        self._places = {0: self.chain - 1}  # node of the proposal -> node here

    def append(self, proposal: Proposal, nodes: Sequence[int]) -> None:
        """These nodes of the proposal are to be run next; their parents were."""
        given, above = proposal.tokens, proposal.parents
        if type(nodes) is range:  # a level: all nodes before it were run, in their order
            shift = self.chain - 1
            parents = above[nodes.start : nodes.stop]
            self.parents += [parent + shift for parent in parents] if shift else parents
            self.tokens += given[nodes.start : nodes.stop]
            return
        places = self._places
        self.parents += [places[above[node]] for node in nodes]
        places.update(zip(nodes, count(len(self.tokens)), strict=False))
        self.tokens += [given[node] for node in nodes]

    def new(self) -> Nodes:
        """What was not run yet."""
        return Nodes(self.slot, TokenTree._trusted(self.tokens, self.parents), self.run)

    def follow(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """The path that accepted `tokens` take below the root, and those of them that must be run (again)."""
        node = self.chain - 1  # the root
        path = [*range(self.chain)]
        for i, token in enumerate(tokens):
            node = self._find(node, token)
            if node < 0:
                return path, [*tokens[i:]]
            path.append(node)
        # Every token was run: the last one must be run again, as the next tree's root.
        path.pop()
        return path, [tokens[-1]]

    def _find(self, parent: int, token: int) -> int:
        """The child of `parent` with this token among the nodes that were run, or -1."""
        parents, tokens = self.parents, self.tokens
        for node in range(parent + 1, self.run):
            if parents[node] == parent and tokens[node] == token:
                return node
        return -1


def grow(plan: Plan, children: Children, proposal: Proposal, own: OwnTree, calls: int) -> Working[Proposal]:
    """Expand `proposal`, its root only, by at most `calls` calls of the draft; returns what is to be verified."""
    for call in range(calls):
        nodes, counts = plan.wanted(call, proposal)
        if not nodes:
            break
        if call:
            own.append(proposal, nodes)
        logits = yield own.new()
        own.run = len(own.tokens)
        if not call and own.chain > 1:
            logits = logits[-1:]  # the root's, without rows of caught-up tokens
        children.append(proposal, nodes, counts, logits)
    return plan.chosen(proposal)


class ByLevels:
    """All nodes of the newest level, by a policy of widths. The last level is proposed and never run.

    `most`: nodes of the proposal at most; `widest`: ids that may be proposed.
    """

    def __init__(self, policy: TreePolicy, most: int, widest: int) -> None:
        self._policy, self._most, self._widest = policy, most, widest
        self._newest = 0  # where the newest level begins

    def wanted(self, call: int, proposal: Proposal) -> tuple[Sequence[int], Sequence[int]]:
        begin, end = self._newest, len(proposal.tokens)
        size = end - begin
        if not size:
            return (), ()
        widths, room = self._policy.widths(call, proposal), self._most - end
        if isinstance(widths, int):
            counts = [min(widths, self._widest, room // size)] * size
        else:
            counts = _fit(widths, size, room, self._widest)
        if not counts or max(counts) <= 0:
            return (), ()
        self._newest = end
        return range(begin, end), counts

    def chosen(self, proposal: Proposal) -> Proposal:
        return proposal


def _fit(widths: Sequence[int], level: int, room: int, widest: int) -> list[int]:
    """A list of widths cut to the nodes and the ids there are; the first nodes keep theirs."""
    if not len(widths):
        return []
    if len(widths) != level:
        expected = f"a number, an empty list or {level} numbers, one a node of the newest level"
        raise InvalidOption(name="policy", got=list(widths), expected=expected, fix="Correct the policy's `widths`.")
    counts = []
    for width in widths:
        counts.append(max(0, min(width, room, widest)))
        room -= counts[-1]
    return counts


class ByChoice:
    """Nodes that a policy picks wherever they are, by the draft's probabilities; the result is pruned.

    `room`: nodes that the draft can run beside the root.
    """

    def __init__(self, policy: ChoosingPolicy, most: int, widest: int, room: int) -> None:
        self._policy, self._most, self._widest, self._room = policy, most, widest, room
        self._value: list[float] = []
        self._run: set[int] = set()

    def wanted(self, call: int, proposal: Proposal) -> tuple[Sequence[int], Sequence[int]]:
        asked = self._policy.expand(call, proposal, self._values(proposal))
        # one that was run before had no usable logits
        wanted = [(node, min(k, self._widest)) for node, k in asked if k > 0 and node not in self._run]
        if call:
            wanted = wanted[: max(0, self._room)]
            self._room -= len(wanted)
        nodes = [node for node, _ in wanted]
        self._run.update(nodes)
        return nodes, [k for _, k in wanted]

    def chosen(self, proposal: Proposal) -> Proposal:
        value = self._values(proposal)
        kept = self._policy.select(proposal, value)
        if len(kept) > self._most:
            kept = sorted(sorted(kept, key=lambda node: (-value[node], node))[: self._most])
        return pruned(proposal, kept)

    def _values(self, proposal: Proposal) -> list[float]:
        """Of each node, the product of the draft's probabilities on its path."""
        assert proposal.q is not None, "a policy that chooses needs q"
        value, parents = self._value, proposal.parents
        for node in range(len(value), len(parents)):
            value.append(value[parents[node]] * proposal.q[node] if node else 1.0)
        return value


def pruned(proposal: Proposal, kept: Sequence[int]) -> Proposal:
    """The proposal with these nodes only; parents are kept with their children."""
    if len(kept) == len(proposal.tokens):
        return proposal
    place = {node: i for i, node in enumerate(kept)}
    place[-1] = -1

    def pick(values: list[int]) -> list[int]:
        return [values[node] for node in kept]

    return Proposal(
        pick(proposal.tokens),
        [place[proposal.parents[node]] for node in kept],
        pick(proposal.depths),
        pick(proposal.ranks),
        None if proposal.q is None else [proposal.q[node] for node in kept],
        None if proposal.multiplicity is None else pick(proposal.multiplicity),
        proposal.proposer,
        unusable=proposal.unusable,
    )
