"""Suffix decoding: what followed the newest tokens in this request, and in what the process wrote before.

SuffixDecoding (Oliaro et al., arXiv 2411.04975) keeps a suffix tree of earlier outputs beside the request's own. Here
both are suffix automata; the earlier outputs lie in two of them, and the older one is dropped when the younger one is
full, so that memory is bounded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from ...errors import InvalidOption
from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal
from .automaton import Matcher, SuffixAutomaton
from .ngram import NGramSession
from .protocol import DraftRequest
from .registry import DraftContext, register_draft
from .retrieval import grown

REMEMBERED = 65536
"""Tokens of earlier outputs; at about 0.7 kB each."""
BEFORE = 8
"""Tokens of the prompt that are remembered with the output: what an output begins with follows them."""
MIN_MATCH = 2
LOOK_BACK = 64
"""Newest tokens that are looked for anew when the older half of the memory was dropped."""


class Outputs:
    """Earlier outputs, at most `most` tokens, the newest ones. Threads may share it."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self.most = most
        self.lock = threading.RLock()
        self.halves = [SuffixAutomaton()]
        """The older one first."""

    def add(self, text: Sequence[int]) -> None:
        half = self.most // 2
        with self.lock:
            if self.halves[-1].size and self.halves[-1].size + len(text) + 1 > half:
                self.halves = [self.halves[-1], SuffixAutomaton()]
            young = self.halves[-1]
            for token in text[-max(0, half - 1) :]:
                young.append(token)
            young.separate()

    @property
    def size(self) -> int:
        return sum(half.size for half in self.halves)


class SuffixDraft:
    """Proposes what followed the longest earlier occurrence of the newest tokens, here or in earlier outputs."""

    name = "suffix"
    compile_seconds = 0.0
    min_match = MIN_MATCH

    def __init__(self, outputs: Outputs | None = None) -> None:
        self.outputs = Outputs() if outputs is None else outputs
        self.prefill_seconds = 0.0

    def open(self, request: DraftRequest) -> SuffixSession:
        return SuffixSession(self, request)


class SuffixSession(NGramSession):
    """One request. Its own text is matched as `ngram` does; the longer match wins, its own where they are equal."""

    def __init__(self, draft: SuffixDraft, request: DraftRequest) -> None:
        super().__init__(draft, request)
        self._outputs = draft.outputs if request.remember else Outputs()
        self._tokens: list[int] = []
        self._first = len(request.prompt)
        self._followed = 0  # tokens that the matchers have seen
        self._matchers: list[Matcher] = []

    def accept(self, tokens: Sequence[int]) -> None:
        super().accept(tokens)
        self._tokens += tokens

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        if limits.depth <= 0:
            return super().propose(policy, limits)
        with self._outputs.lock:
            best = self._longest()
            self._index()
            if best is None or best.length <= self.text.match()[1]:
                return super().propose(policy, limits)
            proposal = Proposal.root(self._root, q=self._needs_q, proposer=self.draft.name)
            return grown(proposal, best.state, best.automaton.shares, policy, limits)

    def _longest(self) -> Matcher | None:
        """The longest match in earlier outputs that is long enough and went on."""
        halves = self._outputs.halves
        if [m.automaton for m in self._matchers] != halves:
            self._matchers = [Matcher(half) for half in halves]
            self._followed = max(0, len(self._tokens) - LOOK_BACK)
        for token in self._tokens[self._followed :]:
            for matcher in self._matchers:
                matcher.follow(token)
        self._followed = len(self._tokens)
        for matcher in self._matchers:
            matcher.settle(MIN_MATCH)
        best = max(self._matchers, key=lambda m: m.length)
        return best if best.length >= MIN_MATCH else None

    def close(self) -> None:
        output = self._tokens[max(0, self._first - BEFORE) :]
        if len(self._tokens) > self._first:
            self._outputs.add(output)
        self._tokens = []


_OUTPUTS: weakref.WeakKeyDictionary[object, Outputs] = weakref.WeakKeyDictionary()


def _named(argument: str, context: DraftContext) -> SuffixDraft:
    """`suffix`, `suffix:TOKENS`: what is remembered lives as long as the target's program."""
    if argument and not (argument.isdecimal() and int(argument) >= 2):
        raise InvalidOption(name="draft", got=f"suffix:{argument}", expected='"suffix" or "suffix:TOKENS", 2 or more')
    most = int(argument) if argument else REMEMBERED
    known = _OUTPUTS.get(context.target)
    if known is None or (argument and known.most != most):
        known = _OUTPUTS[context.target] = Outputs(most)
    return SuffixDraft(known)


register_draft("suffix", _named, usage='"suffix", "suffix:TOKENS" (remembered)')
