"""Which child sampler goes with which verifier, and the refusal of pairs that are not lossless.

`tests/speculation/test_lossless.py` enumerates every allowed pair and shows that every refused one is biased.
"""

from __future__ import annotations

from ...errors import InvalidOption, LossyPair
from ..policies.protocol import TreePolicy
from ..sampling.samplers import SAMPLERS, ChildSampler, SamplerKind, as_sampler
from . import VERIFIERS, BlockVerification, StochasticVerifier
from .greedy import GreedyVerifier, Verifier

DEFAULT_VERIFIER = "traversal"

# Why a rule that reads q is wrong about children of this kind.
_REASONS: dict[tuple[SamplerKind, str], str] = {
    ("top-k", "multi-step"): "The rule divides by the chance of drawing a child, but the top k are not drawn at all.",
    ("top-k", "recursive"): "The rule divides by the chance of drawing a child, but the top k are not drawn at all.",
    ("top-k", "traversal"): "The rule divides by the chance of drawing a child, but the top k are not drawn at all.",
    ("top-k", "block"): "The rule divides by the chance of drawing a child, but the top one is not drawn at all.",
    ("without-replacement", "multi-step"): (
        "The rule takes every child as a draw from the same q, but a second child is never the first one again."
    ),
    ("iid", "recursive"): (
        "The rule takes a second child as a draw from q without the first one, but it may be the first one again."
    ),
}


def as_pair(
    verifier: StochasticVerifier | Verifier | str | None, sampler: ChildSampler | str | None
) -> tuple[StochasticVerifier, ChildSampler]:
    """Verifier and child sampler for sampling; what is left out is chosen to fit, a lossy pair is refused."""
    if sampler is None:
        rule = as_stochastic_verifier(verifier or DEFAULT_VERIFIER)
        return rule, SAMPLERS[rule.samplers[0]]
    chosen = as_sampler(sampler)
    if verifier is None:
        rule = VERIFIERS[DEFAULT_VERIFIER]
        return (rule if chosen.kind in rule.samplers else VERIFIERS["naive"]), chosen
    rule = as_stochastic_verifier(verifier)
    if chosen.kind not in rule.samplers:
        reason = _REASONS.get((chosen.kind, rule.name), f"{rule.name!r} does not list {chosen.kind!r}.")
        fitting = ", ".join(repr(v.name) for v in VERIFIERS.values() if chosen.kind in v.samplers and v.name != "block")
        raise LossyPair(
            pair=f"sampler={chosen.kind!r} with verifier={rule.name!r}",
            reason=reason,
            instead=f"sampler={rule.samplers[0]!r} with verifier={rule.name!r}, or keep the sampler with {fitting}",
        )
    return rule, chosen


def as_stochastic_verifier(verifier: StochasticVerifier | Verifier | str) -> StochasticVerifier:
    if isinstance(verifier, str) and verifier in VERIFIERS:
        return VERIFIERS[verifier]
    if isinstance(verifier, StochasticVerifier) and not isinstance(verifier, type):
        return verifier
    if verifier == "greedy" or isinstance(verifier, GreedyVerifier):
        raise LossyPair(
            pair="verifier='greedy' with a temperature above 0",
            reason="Greedy verification gives the target's likeliest tokens, not samples.",
            instead="temperature=0, or one of " + ", ".join(map(repr, VERIFIERS)),
        )
    expected = f"one of 'greedy', {', '.join(map(repr, VERIFIERS))}, or a StochasticVerifier"
    raise InvalidOption(name="verifier", got=verifier, expected=expected)


def check_shape(verifier: StochasticVerifier, policy: TreePolicy, drafts: int) -> None:
    """Refuse trees the rule is not meant for, as far as they are known before the first one."""
    if not isinstance(verifier, BlockVerification) or not drafts:
        return
    if drafts > 1 or policy.max_nodes > policy.max_depth + 1:
        got = f"'block' with {drafts} drafts" if drafts > 1 else f"'block' with the policy {policy}"
        fix = "Traversal verification is the same rule for trees: verifier='traversal'."
        expected = "a chain: one draft and a policy such as '1,1,1,1'"
        raise InvalidOption(name="verifier", got=got, expected=expected, fix=fix)
