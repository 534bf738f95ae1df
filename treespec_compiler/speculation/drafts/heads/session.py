"""One request's drafting by a head: what it was told of the target's hidden states, and the tree of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ....ir.device import profile
from ....program.tree_program import TreeProgram
from ...policies.protocol import ChoosingPolicy, Limits, TreePolicy
from ...proposal import Proposal
from ..children import Children, Likeliest, Sampled
from ..growth import ByChoice, ByLevels, Plan
from ..protocol import DraftRequest
from .loaded import LoadedHead
from .vocabulary import ReducedLikeliest, ReducedSampled


@dataclass
class _OfTarget:
    """Whose device the head's rows are on, as a sampler asks."""

    name: str
    program: TreeProgram
    prefill_seconds: float = 0.0


class HeadSession:
    """Grows a tree by calls of the head, a level each; the last level is proposed and never run.

    The rows of accepted tokens are computed again from the target's own hidden states, in the next step's first call.
    """

    def __init__(self, name: str, target: TreeProgram, loaded: LoadedHead, request: DraftRequest) -> None:
        self._name, self._target, self._loaded = name, target, loaded
        self._head, self.reads = loaded.head, loaded.reads
        self._needs_q, self._widest = request.needs_q, loaded.head.shape.draft_vocab
        self._likeliest = self._choosing(request)
        self._children = self._likeliest if request.by_logits else self._drawing(request)
        self._places = loaded.places()
        self._hidden: list[Tensor] = []  # [n, taps * D] of tokens whose rows were not computed
        self._after: list[int] = []  # the token behind each of these
        self._begun, self._root = False, -1
        self._rows: Tensor | None = None  # logits of the root
        self._outputs: list[Tensor] = []  # [h] of the root and of each node that was run

    def _choosing(self, request: DraftRequest) -> Children:
        ids = self._head.ids
        return Likeliest(request.needs_q, self._widest) if ids is None else ReducedLikeliest(request.needs_q, ids)

    def _drawing(self, request: DraftRequest) -> Children:
        sampled = Sampled(_OfTarget(self._name, self._target), request)
        return sampled if self._head.ids is None else ReducedSampled(sampled, self._head.ids, request.vocab_size)

    def read(self, hidden: Mapping[str, Tensor]) -> None:
        self._hidden.append(torch.cat([hidden[name] for name in self.reads], -1))  # a copy: it is another's memory

    def accept(self, tokens: Sequence[int]) -> None:
        self._children.accept(tokens)
        # Hidden states are those of the token before.
        self._after += tokens if self._begun else tokens[1:]
        self._begun, self._root = True, tokens[-1]
        self._places.drop()

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        proposal = Proposal.root(self._root, q=self._needs_q, proposer=self._name)
        plan: Plan
        children = self._children
        if getattr(policy, "expand", None) is not None:
            children = self._likeliest  # chosen by looking at them, so not by chance
            plan = ByChoice(cast("ChoosingPolicy", policy), limits.nodes, self._widest, limits.nodes * limits.depth)
        else:
            plan = ByLevels(policy, limits.nodes, self._widest)
        children.begin(proposal)
        run: dict[int, int] = {0: -1}  # node of the proposal -> node of the places
        for call in range(self._calls(limits)):
            nodes, counts = plan.wanted(call, proposal)
            if not nodes:
                break
            logits = self._caught_up() if not call else self._level(proposal, nodes, run)
            children.append(proposal, nodes, counts, logits)
        return plan.chosen(proposal)

    def _calls(self, limits: Limits) -> int:
        """Levels that a tree may have."""
        return limits.depth

    def _caught_up(self) -> Tensor:
        """Logits [1, draft vocabulary] of the root's row, behind those of all accepted tokens that had none."""
        self._places.drop()
        if self._after:  # else the step is begun again
            chunk = profile(self._target.device).prompt_chunk
            hidden, after = torch.cat(self._hidden), self._after
            self._hidden, self._after = [], []
            for start in range(0, len(after), chunk):
                self._rows, self._outputs = self._append(after[start : start + chunk], hidden[start : start + chunk])
        assert self._rows is not None
        del self._outputs[1:]
        return self._rows

    def _append(self, tokens: Sequence[int], hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Commit places of these tokens; logits [1, draft vocabulary] and output of the last one."""
        first = self._places.committed
        places = torch.arange(first, first + len(tokens), device=hidden.device)
        normed, output = self._run(tokens, self._head.fused(hidden), places, self._places.chain(len(tokens)))
        self._places.commit()
        return self._head.logits(normed[-1:]), [output[-1]]

    def _level(self, proposal: Proposal, nodes: Sequence[int], run: dict[int, int]) -> Tensor:
        """Logits [nodes, draft vocabulary] of nodes whose parents were run."""
        parents = [run[proposal.parents[node]] for node in nodes]
        run.update((node, len(self._outputs) - 1 + i) for i, node in enumerate(nodes))
        hidden = torch.stack([self._outputs[parent + 1] for parent in parents])
        depths = torch.tensor([proposal.depths[node] for node in nodes], device=hidden.device)
        tokens = [proposal.tokens[node] for node in nodes]
        seen = self._places.grow(parents)
        normed, output = self._run(tokens, hidden, self._places.committed - 1 + depths, seen)
        self._outputs += output.unbind()
        return self._head.logits(normed)

    def _run(self, tokens: Sequence[int], hidden: Tensor, places: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(tokens, device=hidden.device)
        q, k, v, beside = self._head.projected(
            self._loaded.embedding(self._target)[ids].to(hidden.dtype), hidden, places
        )
        return self._head.attended(q, *self._places.add(k, v), seen, beside)

    def close(self) -> None:
        """What it held goes with it."""
        self._hidden, self._outputs = [], []
