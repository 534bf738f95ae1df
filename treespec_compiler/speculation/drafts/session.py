"""One request's drafting by a model: its tokens in the draft's cache, and the tree of the step under way."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import cast

from ...program.tree_program import TreeProgram
from ..policies.protocol import ChoosingPolicy, Limits, TreePolicy
from ..proposal import Proposal
from ..slots import Slot
from ..work import Prompt, Working
from .children import Children, Likeliest, Sampled
from .growth import ByChoice, ByLevels, OwnTree, Plan, grow
from .protocol import DraftRequest, ProgramDraft

# Accepted tokens the draft never ran join the next tree as a chain up to here; longer ones are prefilled.
MAX_CHAIN = 16
STAND_IN = 0


class ModelDraftSession:
    """Grows a tree by packed calls; the last level is proposed and never run."""

    def __init__(self, draft: ProgramDraft, request: DraftRequest, slot: Slot | None = None) -> None:
        self.draft, self.program = draft, draft.program
        self._shared = min(self.program.vocab_size, request.vocab_size)
        self._needs_q = request.needs_q
        self._likeliest = Likeliest(request.needs_q, self._shared)
        self._children: Children = self._likeliest if request.by_logits else Sampled(draft, request)
        limit = self.program.max_context
        tokens = request.max_tokens if limit is None else min(request.max_tokens, limit)
        self._capacity = tokens + request.max_nodes + MAX_CHAIN
        self._max_context = self._capacity if limit is None else limit
        self._slot, self._slots = slot, request.slots
        self._length = 0  # tokens the draft has committed
        self._pending: list[int] = []  # accepted tokens it has not run; the last one is the next root
        self._own: OwnTree | None = None  # of the step under way

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal | Working[Proposal]:
        proposal = Proposal.root(self._pending[-1], q=self._needs_q, proposer=self.draft.name)
        # The last level is never run, so the deepest position run is the root's plus `calls - 1`.
        calls = min(limits.depth, self._max_context - (self._length + len(self._pending) - 1))
        self._own = None
        if calls <= 0:
            return proposal
        slot = self._slot
        if slot is None or len(self._pending) > MAX_CHAIN:
            return self._prefilled(policy, limits, proposal, calls)
        return self._grow(slot, policy, limits, proposal, calls)

    def _prefilled(self, policy: TreePolicy, limits: Limits, proposal: Proposal, calls: int) -> Working[Proposal]:
        slot = yield from self._prefill()
        return (yield from self._grow(slot, policy, limits, proposal, calls))

    def _grow(
        self, slot: Slot, policy: TreePolicy, limits: Limits, proposal: Proposal, calls: int
    ) -> Working[Proposal]:
        own = self._own = OwnTree(slot, self._known(self._pending))
        plan: Plan
        if getattr(policy, "expand", None) is not None:
            room = self._capacity - self._length - own.chain
            children: Children = self._likeliest  # chosen by looking at them, so not by chance
            plan = ByChoice(cast("ChoosingPolicy", policy), limits.nodes, self._shared, room)
        else:
            children, plan = self._children, ByLevels(policy, limits.nodes, self._shared)
        children.begin(proposal)
        return grow(plan, children, proposal, own, calls)

    def accept(self, tokens: Sequence[int]) -> None:
        self._children.accept(tokens)
        own = self._own
        if own is None or not own.run:
            self._pending.extend(tokens)
            return
        path, self._pending = own.follow(tokens)
        own.slot.commit(path)
        self._length += len(path)
        self._own = None

    def _prefill(self) -> Working[Slot]:
        """Run all pending tokens but the root, which begins the tree."""
        began, compiled = perf_counter(), self.program.compile_seconds
        slot = self._slot = self._slot or self._slots.take(self.program, self._capacity)
        tokens = self._known(self._pending)
        found = self._slots.adopt(slot, tokens) if not self._length else 0
        if found < len(tokens) - 1:
            yield Prompt(slot, tokens[found:-1])
        self._length += len(self._pending) - 1
        del self._pending[:-1]
        self.draft.prefill_seconds += perf_counter() - began - (self.program.compile_seconds - compiled)
        return slot

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        """With a stand-in for ids the draft lacks: its guesses get worse there, the output stays exact."""
        vocab = self.program.input_vocab
        return [token if token < vocab else STAND_IN for token in tokens] if max(tokens) >= vocab else tokens

    def room(self, nodes: int) -> tuple[Slot | None, TreeProgram, int]:
        new = len(self._pending) + nodes
        return self._slot, self.program, new if self._slot is None else new - self._slot.length + self._length

    def suspend(self) -> None:
        self.close()

    def resume(self, slot: Slot, tokens: Sequence[int]) -> None:
        self._pending, self._length, self._own = [*tokens], 0, None

    def close(self) -> None:
        if self._slot is not None:
            self._slots.give_back(self._slot)
            self._slot = None
