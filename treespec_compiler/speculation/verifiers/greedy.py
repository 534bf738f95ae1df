"""Verifiers: which of a proposal's nodes the target's logits accept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ...errors import InvalidOption, InvalidTree
from ...ir.acceptance import follow
from ..proposal import Proposal
from ..sampling.ranking import likeliest


@dataclass(frozen=True, slots=True)
class Verdict:
    path: list[int]
    """Accepted nodes, root first; the root is the target's own token and always accepted."""
    bonus: int
    """The target's token after the path's last node."""
    unusable: int = -1
    """Place in the path of the first node whose logits were NaN or infinite: nothing after it counts."""
    near_tie: bool | None = None
    """Whether rounding could have decided any of the path's choices; None: not looked at."""


@runtime_checkable
class Verifier(Protocol):
    """Greedy verification: by the logits alone. Sampling has its own protocol, `verifiers.StochasticVerifier`."""

    @property
    def needs_q(self) -> bool:
        """Whether `verify` reads `proposal.q`."""
        ...

    def verify(self, proposal: Proposal, logits: Tensor) -> Verdict:
        """Judge the proposal by `logits` [N, V], the target's row for every node."""
        ...


@dataclass(frozen=True)
class GreedyVerifier:
    """Accepts the nodes that the target's own argmax would have produced; ties go to the lowest id, as in torch."""

    @property
    def needs_q(self) -> bool:
        return False

    def verify(self, proposal: Proposal, logits: Tensor, *, first: int | None = None) -> Verdict:
        """`first`: the target's token after the prefix; it is needed to choose among several roots only."""
        bad: list[int] = []
        choices = likeliest(logits, 1, bad)
        tokens, parents = proposal.tokens, proposal.parents
        if first is None:
            check_one_root(proposal)
            path, want = [0], choices[0]
        else:
            path, want = [], first
        path, want = follow(tokens, parents, path, want, choices.__getitem__)
        if bad:
            return Verdict(path, want, next((i for i, node in enumerate(path) if node in bad), -1))
        return Verdict(path, want)


def check_one_root(proposal: Proposal) -> None:
    if len(proposal.parents) > 1 and -1 in proposal.parents[1:]:
        raise InvalidTree(
            got="several roots",
            expected="one, or `first=` with the target's token after the prefix",
            fix="Only that token tells which root the target would have taken.",
        )


def as_verifier(verifier: Verifier | str | None) -> Verifier:
    """A verifier of greedy decoding from what `generate(verifier=...)` takes."""
    if verifier is None or verifier == "greedy":
        return GreedyVerifier()
    if isinstance(verifier, Verifier) and not isinstance(verifier, type):
        return verifier
    raise InvalidOption(name="verifier", got=verifier, expected="a Verifier, such as GreedyVerifier()")
