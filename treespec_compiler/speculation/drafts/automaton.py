"""An incremental suffix automaton (Blumer et al., 1985): every substring of a growing text and what followed it."""

from __future__ import annotations

# Suffixes of one token whose counts are kept exactly; deeper link chains occur in monotonous text only.
MAX_COUNTED = 64
SEPARATOR = -1
"""Between texts of one automaton: no token."""


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

    def separate(self) -> None:
        """What comes now is another text: nothing follows from one to the other."""
        self.append(SEPARATOR)

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

    def went_on(self, state: int) -> bool:
        """Whether a token of the same text followed."""
        following = self.next[state]
        return len(following) > (SEPARATOR in following)

    def shares(self, state: int, k: int) -> list[tuple[int, int, float]]:
        """As `continuations`, with shares of all that followed instead of counts, the ends of texts left out."""
        following = self.next[state]
        ends = following.get(SEPARATOR)
        total = max(1, sum(self.count[target] for target in following.values()))
        found = self.continuations(state, k + (ends is not None))
        return [(token, target, times / total) for token, target, times in found if token != SEPARATOR][:k]


class Matcher:
    """The longest suffix of a text that occurs in another, growing one."""

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self.state = 0
        self.length = 0
        """Tokens that match; 0: none."""

    def follow(self, token: int) -> None:
        """The text went on with this token."""
        self._normalize()
        step, state = self.automaton.next, self.state
        while state and token not in step[state]:
            state = self.automaton.link[state]
            self.length = self.automaton.length[state]
        found = step[state].get(token)
        self.state, self.length = (0, 0) if found is None else (found, self.length + 1)

    def settle(self, least: int) -> None:
        """Shorten the match to one that went on with something, if one of at least `least` tokens did."""
        self._normalize()
        automaton = self.automaton
        while self.state and not automaton.went_on(self.state):
            self.state = automaton.link[self.state]
            self.length = automaton.length[self.state]
        if self.length < least:
            self.state = self.length = 0

    def _normalize(self) -> None:
        """A state may have been split since: the shorter strings of it are another's now."""
        automaton = self.automaton
        while self.state and automaton.length[automaton.link[self.state]] >= self.length:
            self.state = automaton.link[self.state]
