"""Prompt lookup: proposals from the request's own text, by an incremental suffix automaton; no model is run.

Copying what followed the last occurrence of the newest n tokens is prompt lookup decoding (Saxena, 2023; the n-gram
draft of vLLM). A suffix automaton (Blumer et al., 1985) finds the *longest* such match in constant amortized time a
token, as SAM-Decoding (arXiv 2411.10666) does, and its transitions already are the merged tree of all continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from ...errors import InvalidOption
from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal
from .automaton import SuffixAutomaton
from .protocol import DraftRequest
from .registry import DraftContext, register_draft
from .retrieval import grown


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


class LooksUp(Protocol):
    """A draft whose sessions look the request's own text up."""

    name: str
    prefill_seconds: float
    min_match: int


class NGramSession:
    """One request's text. The index is built when the first proposal is asked for."""

    def __init__(self, draft: LooksUp, request: DraftRequest) -> None:
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
        return grown(proposal, state, self._continuations, policy, limits)

    def _continuations(self, state: int, k: int) -> list[tuple[int, int, float]]:
        """What may follow and how often it did; at the text's end the longest suffix that had a successor decides."""
        text = self.text
        while not text.next[state] and text.length[text.link[state]] >= self.draft.min_match:
            state = text.link[state]
        return text.shares(state, k)

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
