"""Exact distributions of randomized code: every branch of its `Chance` is taken, with its probability.

No random numbers anywhere: a function is run once for every outcome, and the probabilities of the outcomes add up to 1.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from treespec_compiler.speculation.proposal import Draws, Proposal
from treespec_compiler.speculation.sampling.chance import Chance, Row
from treespec_compiler.speculation.sampling.samplers import ChildSampler
from treespec_compiler.speculation.verifiers import StochasticVerifier

T = TypeVar("T")
Path = tuple[int, ...]
Model = Callable[[Path], Row]  # tokens after the root -> distribution of the next one
Law = dict[Path, float]


class ExactChance:
    """Follows a script of branches, then takes the first branch everywhere, and remembers what else there was."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.sizes = script, [0] * len(script)
        self.probability, self._position = 1.0, 0

    def _branch(self, options: list[tuple[Any, float]]) -> Any:
        options = [option for option in options if option[1] > 0.0]
        index = 0
        if len(options) > 1:
            if self._position == len(self.script):
                self.script.append(0)
                self.sizes.append(0)
            self.sizes[self._position] = len(options)
            index = self.script[self._position]
            self._position += 1
        value, probability = options[index]
        self.probability *= probability
        return value

    def accept(self, probability: float) -> bool:
        probability = min(1.0, max(0.0, float(probability)))
        return self._branch([(True, probability), (False, 1.0 - probability)])

    def choose(self, weights: Row) -> int:
        total = float(weights.sum())
        return self._branch([(i, float(w) / total) for i, w in enumerate(weights)])

    def repeated(self, weights: Row, count: int) -> list[int]:
        return [self.choose(weights) for _ in range(count)]

    def distinct(self, weights: Row, count: int) -> list[int]:
        left, found = weights.copy(), []
        while len(found) < count and left.any():
            found.append(self.choose(left))
            left[found[-1]] = 0.0
        return found


def outcomes(run: Callable[[Chance], T]) -> Iterator[tuple[T, float]]:
    """Every result of `run` and its probability; one result may come several times."""
    script: list[int] = []
    while True:
        chance = ExactChance(script)
        yield run(chance), chance.probability
        sizes = chance.sizes
        while script and script[-1] + 1 == sizes[-1]:
            script.pop()
            sizes.pop()
        if not script:
            return
        script[-1] += 1


class Grown(Proposal):
    """A tree below token 0, drawn by a sampler; `lazily`: every child is drawn when a verifier first looks at it.

    What is never looked at integrates to 1, so both ways give the same law; `lazily` takes far fewer branches.
    """

    def __init__(
        self,
        q: Model,
        widths: Sequence[int] | Callable[[Proposal, int], int],
        sampler: ChildSampler,
        chance: Chance,
        *,
        lazily: bool = False,
        q_known: bool = True,
        replacement: bool | None = None,
    ) -> None:
        super().__init__([0], [-1], [0], [0], multiplicity=[1])
        self._q, self._widths, self._sampler, self._chance = q, widths, sampler, chance
        self._q_known = q_known
        self._replacement = sampler.kind != "without-replacement" if replacement is None else replacement
        self._asked: dict[int, list[Draws]] = {}
        self._lazily = lazily
        if not lazily:
            for node in itertools.count():
                if node == len(self.tokens):
                    break
                self.get(node, [])

    def drawn(self) -> Any:
        return self

    def __contains__(self, node: int) -> bool:
        return bool(self.get(node, []))

    def __getitem__(self, node: int) -> list[Draws]:
        return self.get(node, [])

    def get(self, node: int, default: Sequence[Draws]) -> list[Draws]:
        if node not in self._asked:
            self._asked[node] = self._draw(node)
        return self._asked[node]

    def _draw(self, node: int) -> list[Draws]:
        depth = self.depths[node]
        if callable(self._widths):
            width = self._widths(self, node)
        else:
            width = self._widths[depth] if depth < len(self._widths) else 0
        if not width:
            return []
        q = self._q(tuple(self.path_tokens(node)))
        if self._lazily:
            return [_OneByOne(self, node, q, width, self._chance, self._replacement)]
        children: list[int] = []
        for token in self._sampler.draw(q, width, self._chance):
            children.append(self.child(node, token))
        return [Draws(children, q if self._q_known else None, self._replacement)]

    def child(self, parent: int, token: int) -> int:
        for node in range(parent + 1, len(self.tokens)):
            if self.parents[node] == parent and self.tokens[node] == token:
                return node
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ranks.append(0)
        return len(self.tokens) - 1


class _OneByOne(Draws):
    """Draws made one after the other, as a verifier asks for them."""

    def __init__(self, tree: Grown, node: int, q: Row, width: int, chance: Chance, replacement: bool) -> None:
        super().__init__([], q, replacement)
        self._tree, self._node, self._width, self._chance = tree, node, width, chance

    def in_order(self, tokens: Sequence[int], replacement: bool) -> Iterator[tuple[int, Row]]:
        assert replacement == self.replacement, "only for pairs that fit"
        q = self.q
        for _ in range(self._width):
            if not q.any():
                return
            child = self._tree.child(self._node, self._chance.choose(q))
            yield child, q
            if not replacement:
                q = q.copy()
                q[tokens[child]] = 0.0
                q /= q.sum() or 1.0


def verify_law(verifier: StochasticVerifier, propose: Callable[[Chance], Proposal], p: Model) -> Law:
    """The exact law of what one step puts out: accepted tokens and the bonus token."""

    def run(chance: Chance) -> Path:
        proposal = propose(chance)
        verdict = verifier.verify(proposal, lambda node: p(tuple(proposal.path_tokens(node))).copy(), chance)
        return (*proposal.path_tokens(verdict.path[-1]), verdict.bonus)

    return law(outcomes(run))


def law(pairs: Iterable[tuple[Path, float]]) -> Law:
    total: dict[Path, float] = defaultdict(float)
    for output, probability in pairs:
        total[output] += probability
    return dict(total)


def completed(outputs: Mapping[Path, float], p: Model, length: int) -> Law:
    """The law of the first `length` tokens when p goes on after each output, as decoding does."""
    total: dict[Path, float] = defaultdict(float)
    stack = list(outputs.items())
    while stack:
        path, probability = stack.pop()
        if len(path) >= length:
            total[path[:length]] += probability
        else:
            stack += [((*path, token), probability * float(x)) for token, x in enumerate(p(path)) if x > 0]
    return dict(total)


def target_law(p: Model, length: int) -> Law:
    return completed({(): 1.0}, p, length)


def error(found: Law, wanted: Law) -> float:
    """Total variation distance."""
    return 0.5 * sum(abs(found.get(path, 0.0) - wanted.get(path, 0.0)) for path in found.keys() | wanted.keys())


def mean_length(outputs: Law) -> float:
    return sum(len(path) * probability for path, probability in outputs.items())


def table(vocab_size: int, seed: int, *, zeros: float = 0.0, sharpness: float = 1.0) -> Model:
    """Random distributions, another for every path; a share of `zeros` has no probability."""
    rows: dict[Path, Row] = {}

    def model(path: Path) -> Row:
        if path not in rows:
            generator = np.random.default_rng([seed, len(path), *path])
            row = generator.standard_exponential(vocab_size) ** sharpness
            row[generator.random(vocab_size) < zeros] = 0.0
            if not row.any():
                row[generator.integers(vocab_size)] = 1.0
            rows[path] = row / row.sum()
        return rows[path]

    return model
