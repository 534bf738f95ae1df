"""Prompt lookup: proposals from the request's own text, by an incremental suffix automaton; no model is run.

Copying what followed the last occurrence of the newest n tokens is prompt lookup decoding (Saxena, 2023; the n-gram
draft of vLLM). A suffix automaton (Blumer et al., 1985) finds the *longest* such match in constant amortized time a
token, as SAM-Decoding (arXiv 2411.10666) does, and its transitions already are the merged tree of all continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from ...errors import InvalidOption
from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal
from .protocol import DraftRequest
from .registry import DraftContext, register_draft

# Suffixes of one token whose counts are kept exactly; deeper link chains occur in monotonous text only.
MAX_COUNTED = 64


class SuffixAutomaton:
    """Every substring of a growing text, its occurrences and what followed them. State 0 is the empty string.

    A state is a class of strings with the same end positions; `length` is that of its longest one.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        """Occurrences of the state's strings."""
        self.recent = [0]
        """Where the latest one ended."""
        self.size = 0
        self._last = 0

    def append(self, token: int) -> None:
        step, link, length = self.next, self.link, self.length
        self.size += 1
        new = self._state({}, self.size, -1, 0)
        state, self._last = self._last, new
        while state >= 0 and token not in step[state]:
            step[state][token] = new
            state = link[state]
        if state < 0:
            link[new] = 0
        else:
            found = step[state][token]
            if length[state] + 1 == length[found]:
                link[new] = found
            else:
                clone = self._state(dict(step[found]), length[state] + 1, link[found], self.count[found])
                self.recent[clone] = self.recent[found]
                while state >= 0 and step[state].get(token) == found:
                    step[state][token] = clone
                    state = link[state]
                link[found] = link[new] = clone
        state, room = new, MAX_COUNTED
        while state > 0 and room:
            self.count[state] += 1
            self.recent[state] = self.size
            state, room = link[state], room - 1

    def _state(self, following: dict[int, int], length: int, link: int, count: int) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.count.append(count)
        self.recent.append(0)
        return len(self.next) - 1

    def match(self) -> tuple[int, int]:
        """The longest suffix of the text that occurs earlier too: its state and length (0, 0: none)."""
        state = max(0, self.link[self._last])
        return state, self.length[state]

    def continuations(self, state: int, k: int) -> list[tuple[int, int, int]]:
        """The k tokens that followed most often, the latest first where equal: (token, state, times)."""
        following = self.next[state]
        if len(following) > 1:
            count, recent = self.count, self.recent
            order = sorted(following.items(), key=lambda item: (-count[item[1]], -recent[item[1]]))[:k]
        else:
            order = list(following.items())
        return [(token, target, self.count[target]) for token, target in order]


class NGramDraft:
    """Proposes what followed the longest earlier occurrence of the newest tokens.

    `min_match`: shortest suffix that counts as a match. Below it nothing is proposed, and the step costs nothing more.
    """

    compile_seconds = 0.0

    def __init__(self, min_match: int = 2, name: str = "ngram") -> None:
        self.min_match, self.name = min_match, name
        self.prefill_seconds = 0.0

    def open(self, request: DraftRequest) -> NGramSession:
        return NGramSession(self, request)


class NGramSession:
    """One request's text. The index is built when the first proposal is asked for."""

    def __init__(self, draft: NGramDraft, request: DraftRequest) -> None:
        self.draft = draft
        self.text = SuffixAutomaton()
        self._needs_q = request.needs_q
        self._pending: list[int] = []
        self._root = -1

    def accept(self, tokens: Sequence[int]) -> None:
        self._pending += tokens
        self._root = tokens[-1]

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        """A tree of earlier continuations in the policy's widths, chosen without chance.

        q, which only policies read, is the share of the earlier occurrences that went on like this.
        """
        proposal = Proposal.root(self._root, q=self._needs_q, proposer=self.draft.name)
        if limits.depth <= 0:
            return proposal
        self._index()
        state, matched = self.text.match()
        if matched < self.draft.min_match:
            return proposal
        states, frontier = [state], [0]  # automaton state of each node; nodes of the newest level
        if proposal.q is None and policy.needs_q:
            proposal.q = [1.0]
        for depth in range(min(limits.depth, policy.max_depth)):
            widths = self._widths(policy, depth, proposal, len(frontier))
            level: list[int] = []
            for node, width in zip(frontier, widths):
                width = min(width, limits.nodes - len(proposal.tokens))
                found = self._continuations(states[node], width) if width > 0 else []
                for rank, (token, target, share) in enumerate(found):
                    level.append(len(proposal.tokens))
                    proposal.tokens.append(token)
                    proposal.parents.append(node)
                    proposal.depths.append(depth + 1)
                    proposal.ranks.append(rank)
                    states.append(target)
                    if proposal.q is not None:
                        proposal.q.append(share)
            if not level:
                break
            frontier = level
        return proposal

    def _widths(self, policy: TreePolicy, depth: int, proposal: Proposal, frontier: int) -> Sequence[int]:
        """A level's widths; where the policy counts on more nodes than there are, its first ones."""
        widths = policy.widths(depth, proposal)
        return [widths] * frontier if isinstance(widths, int) else widths

    def _continuations(self, state: int, k: int) -> list[tuple[int, int, float]]:
        """What may follow and how often it did; at the text's end the longest suffix that had a successor decides."""
        text = self.text
        while not text.next[state] and text.length[text.link[state]] >= self.draft.min_match:
            state = text.link[state]
        total = max(1, sum(text.count[target] for target in text.next[state].values()))
        return [(token, target, times / total) for token, target, times in text.continuations(state, k)]

    def _index(self) -> None:
        began = perf_counter()
        append, first = self.text.append, not self.text.size
        for token in self._pending:
            append(token)
        self._pending.clear()
        if first:
            self.draft.prefill_seconds += perf_counter() - began

    def close(self) -> None:
        """Nothing is held."""


def _named(argument: str, context: DraftContext) -> NGramDraft:
    if argument:
        raise InvalidOption(name="draft", got=f"ngram:{argument}", expected='"ngram"')
    return NGramDraft()


register_draft("ngram", _named)
