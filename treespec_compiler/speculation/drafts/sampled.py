"""A draft model's session where children are drawn from its processed distributions, and those are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...tree import TokenTree
from ..policies.protocol import TreePolicy
from ..proposal import Draws, Proposal
from ..sampling.device_rows import row_sampler
from ..sampling.rows import Drawn
from ..sampling.settings import Sampling
from .protocol import DraftRequest, ProgramDraft
from .session import ModelDraftSession, _fit

if TYPE_CHECKING:
    from ...program.cache import TreeCache


class SampledDraftSession(ModelDraftSession):
    """As `ModelDraftSession`, level by level, with children from `request.sampler`.

    NOTE: a policy must choose widths before the children are drawn, as `widths` does. Dropping some of them afterwards
    would leave children that are no longer draws from q.
    """

    def __init__(self, draft: ProgramDraft, request: DraftRequest) -> None:
        super().__init__(draft, request)
        assert request.sampler is not None and request.chance is not None and request.sampling is not None
        sampling = _draft_sampling(request.sampling)
        self._rows = row_sampler(draft.program, sampling, request.sampler, request.chance, request.vocab_size)
        self._kind = request.sampler.kind

    def accept(self, tokens: Sequence[int]) -> None:
        self._rows.accept(tokens)
        super().accept(tokens)

    def _grow(
        self, cache: TreeCache, policy: TreePolicy, proposal: Proposal, depth_limit: int, node_limit: int
    ) -> None:
        tokens, parents, shift = self._tokens, self._parents, self._chain - 1
        draws: dict[int, list[Draws]] = {}
        by_chance = self._kind != "top-k"
        if by_chance:
            proposal.draws = draws
            proposal.multiplicity = [1]
        start, frontier = 0, 1  # first node not run; nodes of the newest level
        for depth in range(depth_limit):
            counts = self._counts(policy.widths(depth, proposal), frontier, node_limit - len(proposal.tokens))
            if not any(counts):
                return
            logits = self.program.extend(TokenTree._trusted(tokens, parents), cache, start=start)  # [new, V]
            start = self._run = len(tokens)
            first = len(proposal.tokens) - frontier
            paths = [proposal.path_tokens(first + i) for i in range(frontier)] if self._rows.needs_paths else None
            for i, drawn in enumerate(self._rows.draw(logits[-frontier:, : self._shared], counts, paths)):
                if drawn is None:
                    proposal.unusable += 1
                elif counts[i]:
                    children = _append(drawn, first + i, depth + 1, proposal)
                    if by_chance:
                        draws[first + i] = [Draws(children, drawn.q, self._kind == "iid", self.draft.name)]
            frontier = len(proposal.tokens) - first - frontier
            if not frontier:
                return
            tokens += proposal.tokens[-frontier:]
            parents += [p + shift for p in proposal.parents[-frontier:]]

    def _counts(self, widths: int | Sequence[int], frontier: int, room: int) -> list[int]:
        if isinstance(widths, int):
            return [min(widths, self._shared, room // frontier)] * frontier
        return _fit(widths, frontier, room, self._shared)


def _append(drawn: Drawn, parent: int, depth: int, proposal: Proposal) -> list[int]:
    """Append the drawn children of `parent`; the node of every draw."""
    node_of: dict[int, int] = {}
    nodes = []
    for token, probability in zip(drawn.tokens, drawn.probabilities, strict=True):
        node = node_of.get(token)
        if node is None:
            node = node_of[token] = len(proposal.tokens)
            proposal.tokens.append(token)
            proposal.parents.append(parent)
            proposal.depths.append(depth)
            proposal.ranks.append(len(node_of) - 1)
            if proposal.q is not None:
                proposal.q.append(probability)
            if proposal.multiplicity is not None:
                proposal.multiplicity.append(1)
        elif proposal.multiplicity is not None:
            proposal.multiplicity[node] += 1
        nodes.append(node)
    return nodes


def _draft_sampling(sampling: Sampling) -> Sampling:
    """Greedy decoding still ranks several children, by the logits after bias and penalty."""
    return replace(sampling, temperature=1.0, top_k=None, top_p=None, min_p=None) if sampling.greedy else sampling
