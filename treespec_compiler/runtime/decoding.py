"""From what `generate` was asked for to who judges the drafts, and by what chance they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ..speculation.policies.protocol import TreePolicy
from ..speculation.sampling.chance import SeededChance
from ..speculation.sampling.samplers import SAMPLERS, ChildSampler, as_sampler
from ..speculation.sampling.settings import Sampling
from ..speculation.verifiers import VERIFIERS, StochasticVerifier
from ..speculation.verifiers.greedy import GreedyVerifier, Verifier, as_verifier
from ..speculation.verifiers.judge import GreedyJudge, Judge, SamplingJudge
from ..speculation.verifiers.pairs import as_pair, as_stochastic_verifier, check_shape

AnyVerifier: TypeAlias = Verifier | StochasticVerifier | str


@dataclass(frozen=True, slots=True)
class Drawing:
    """What sampling needs beside the judge; greedy decoding has none."""

    sampling: Sampling
    sampler: ChildSampler
    chance: SeededChance
    seeded: bool
    """Whether the user gave the seed."""


def choose(
    sampling: Sampling,
    verifier: AnyVerifier | None,
    sampler: ChildSampler | str | None,
    policy: TreePolicy,
    *,
    drafts: int,
) -> tuple[Verifier | StochasticVerifier, ChildSampler]:
    """Who accepts and how children are drawn; refuses pairs that are not lossless.

    At temperature 0 every rule accepts what greedy accepts, and the sampler is not asked.
    """
    if not sampling.greedy:
        rule, chosen = as_pair(verifier, sampler)
        check_shape(rule, policy, drafts)
        return rule, chosen
    if sampler is not None:
        as_sampler(sampler)
    greedy = _greedy(verifier)
    return greedy if sampling.plain else VERIFIERS["naive"], SAMPLERS["top-k"]  # on one-hot distributions


def appoint(
    sampling: Sampling,
    verifier: AnyVerifier | None,
    sampler: ChildSampler | str | None,
    policy: TreePolicy,
    *,
    drafts: int,
) -> tuple[Judge, Drawing | None]:
    """The judge of a request and what drafts draw by, as `choose` says. Takes a seed from torch if there is none."""
    rule, chosen = choose(sampling, verifier, sampler, policy, drafts=drafts)
    if not isinstance(rule, StochasticVerifier):
        return GreedyJudge(rule), None
    seeded = sampling.seed is not None
    if not seeded:
        # torch's generator, so that `torch.manual_seed` decides as it does elsewhere
        sampling = replace(sampling, seed=int(torch.randint(2**62, ()).item()))
    assert sampling.seed is not None
    chance = SeededChance(sampling.seed)
    return SamplingJudge(rule, sampling, chance), Drawing(sampling, chosen, chance, seeded)


def _greedy(verifier: AnyVerifier | None) -> Verifier:
    if isinstance(verifier, StochasticVerifier):
        return GreedyVerifier()
    if isinstance(verifier, str) and verifier != "greedy":
        as_stochastic_verifier(verifier)
        return GreedyVerifier()
    return as_verifier(verifier)
