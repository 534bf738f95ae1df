"""Every allowed pair of child sampler and verifier keeps the target's distribution to 1e-9; every refused one does not.

By enumeration (tests/enumeration.py): no random numbers, no tolerance for noise.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from enumeration import Grown, Model, completed, error, mean_length, outcomes, table, target_law, verify_law
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_compiler.errors import LossyPair
from treespec_compiler.speculation.proposal import Draws, Proposal
from treespec_compiler.speculation.sampling.chance import REPEATS, Chance, SeededChance
from treespec_compiler.speculation.sampling.samplers import SAMPLERS
from treespec_compiler.speculation.verifiers import VERIFIERS, MultiStep, TraversalVerification
from treespec_compiler.speculation.verifiers.pairs import as_pair

EXACT = 1e-9
TREE_RULES = ("naive", "multi-step", "recursive", "traversal")
PAIRS = [(sampler, rule) for rule in TREE_RULES for sampler in SAMPLERS]
ALLOWED = [(sampler, rule) for sampler, rule in PAIRS if sampler in VERIFIERS[rule].samplers]
REFUSED = [pair for pair in PAIRS if pair not in ALLOWED]


def proposer(sampler: str, q: Model, widths, **kw):
    return lambda chance: Grown(q, widths, SAMPLERS[sampler], chance, **kw)


def next_token_error(sampler: str, rule: str, p, q, width: int) -> float:
    """One node and its children: how far the next token is from the target's."""
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    found = verify_law(VERIFIERS[rule], proposer(sampler, lambda _: q, (width,)), lambda _: p)
    return error(completed(found, lambda _: p, 1), {(token,): x for token, x in enumerate(p)})


def tree_error(sampler: str, rule: str, p: Model, q: Model, widths, length: int, **kw) -> float:
    found = verify_law(VERIFIERS[rule], proposer(sampler, q, widths, **kw), p)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    return error(completed(found, p, length), target_law(p, length))


def test_the_table_of_pairs():
    assert set(ALLOWED) == {
        ("top-k", "naive"),
        ("iid", "naive"),
        ("without-replacement", "naive"),
        ("iid", "multi-step"),
        ("without-replacement", "recursive"),
        ("iid", "traversal"),
        ("without-replacement", "traversal"),
    }
    for sampler, rule in ALLOWED:
        assert as_pair(rule, sampler) == (VERIFIERS[rule], SAMPLERS[sampler])
    for sampler, rule in [*REFUSED, ("top-k", "block")]:
        with pytest.raises(LossyPair) as caught:
            as_pair(rule, sampler)
        assert "The rule" in caught.value.reason and repr(VERIFIERS[rule].samplers[0]) in caught.value.instead


CASES = {
    "shared tokens": ([0.4, 0.3, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4]),
    "zero probability in the target": ([0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]),
    "zero probability in the draft": ([0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0]),
    "zeros in both": ([0.5, 0.0, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25]),
    "p = q": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "p = q in thirds": ([1 / 3, 1 / 3, 1 / 3, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]),
    "disjoint supports": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3]),
    "one-hot q": ([0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0]),
    "one-hot p": ([0.0, 1.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]),
    "both one-hot": ([0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
    "near-zero residual": ([0.4, 0.3, 0.2, 0.1], [0.4 + 1e-13, 0.3 - 1e-13, 0.2, 0.1]),
    "residual at the rounding": ([0.1, 0.2, 0.3, 0.4], [0.1 + 2e-17, 0.2, 0.3 - 5e-17, 0.4]),
    "tiny probabilities": ([1 - 3e-12, 1e-12, 1e-12, 1e-12], [1e-12, 1e-12, 1e-12, 1 - 3e-12]),
    "subnormal probabilities": ([1.0, 5e-324, 0.0, 0.0], [5e-324, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sampler", "rule"), ALLOWED)
def test_the_next_token_has_the_targets_distribution(sampler, rule, case, width):
    assert next_token_error(sampler, rule, *CASES[case], width) < EXACT


@st.composite
def distributions(draw):
    """p and q over 2 to 4 tokens, with zeros and with weights of very different size."""
    size = draw(st.integers(2, 4))
    weight = st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(-40, 0).map(lambda x: 10.0**x))
    rows = []
    for _ in range(2):
        row = np.array(draw(st.lists(weight, min_size=size, max_size=size)))
        row[draw(st.integers(0, size - 1))] += draw(st.floats(1e-6, 1.0))
        rows.append(row / row.sum())
    return rows


@given(distributions(), st.integers(1, 3), st.sampled_from(ALLOWED))
@settings(max_examples=400)
def test_the_next_token_for_any_two_distributions(rows, width, pair):
    assert next_token_error(*pair, *rows, width) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("sampler", "rule"), ALLOWED)
def test_trees_of_depth_2_every_draft_enumerated(sampler, rule, zeros):
    p, q = table(3, 1, zeros=zeros), table(3, 2, zeros=zeros)
    assert tree_error(sampler, rule, p, q, (2, 2), 3) < EXACT


@pytest.mark.parametrize(("sampler", "rule"), [pair for pair in ALLOWED if pair[1] != "naive"])
def test_drawing_when_looked_at_gives_the_same_law(sampler, rule):
    p, q = table(3, 3), table(3, 4)
    laws = [verify_law(VERIFIERS[rule], proposer(sampler, q, (2, 2), lazily=lazily), p) for lazily in (False, True)]
    assert error(*laws) < EXACT


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("sampler", "rule"), [("iid", "multi-step"), ("without-replacement", "recursive")])
def test_top_down_rules_at_vocabulary_4_width_3_depth_3(sampler, rule, seed):
    # Below an accepted child the walk starts anew, so only what it looks at needs to be enumerated.
    p, q = table(4, 10 + seed, zeros=0.2), table(4, 20 + seed, zeros=0.2)
    assert tree_error(sampler, rule, p, q, (3, 2, 1), 4, lazily=True) < EXACT


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["iid", "without-replacement"])
def test_traversal_exhaustively_at_vocabulary_3_two_children_depth_3(sampler):
    assert tree_error(sampler, "traversal", table(3, 1), table(3, 2), (2, 2, 2), 4, lazily=True) < EXACT


@pytest.mark.parametrize("sampler", ["iid", "without-replacement"])
def test_traversal_of_depth_3_with_zeros(sampler):
    p, q = table(3, 5, zeros=0.45), table(3, 6, zeros=0.3)
    assert tree_error(sampler, "traversal", p, q, (2, 2, 2), 4, lazily=True) < EXACT


@pytest.mark.parametrize(("sampler", "rule"), ALLOWED)
def test_widths_may_depend_on_what_was_drawn_before(sampler, rule):
    """As adaptive policies choose them: from tokens and siblings drawn so far, but before the children are drawn."""

    def widths(proposal: Proposal, node: int) -> int:
        if proposal.depths[node] == 2:
            return 0
        return 2 if node == 0 else (proposal.tokens[node] + proposal.tokens.count(1) + len(proposal.tokens)) % 3

    assert tree_error(sampler, rule, table(3, 7), table(3, 8), widths, 3) < EXACT


# --- chains


@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("sampler", ["iid", "without-replacement"])
def test_block_verification_of_chains(sampler, zeros):
    p, q = table(3, 9, zeros=zeros), table(3, 10, zeros=zeros)
    assert tree_error(sampler, "block", p, q, (1, 1, 1), 4) < EXACT


def test_block_and_traversal_are_one_rule_on_chains():
    p, q = table(3, 11), table(3, 12)
    laws = [verify_law(VERIFIERS[rule], proposer("iid", q, (1, 1, 1)), p) for rule in ("block", "traversal")]
    assert error(*laws) < EXACT


def test_block_verification_accepts_what_its_paper_says():
    """Its first example: Mb = (1/3, 2/3), Ms = (2/3, 1/3), two tokens: 10/9 accepted by tokens, 11/9 by blocks."""
    p, q = np.array([1, 2]) / 3, np.array([2, 1]) / 3
    accepted = {}
    for rule in ("multi-step", "block"):
        found = verify_law(VERIFIERS[rule], proposer("iid", lambda _: q, (1, 1)), lambda _: p)
        accepted[rule] = mean_length(found) - 1
    assert accepted == pytest.approx({"multi-step": 10 / 9, "block": 11 / 9}, abs=EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_accepted_more_by_theory_is_accepted_more(seed):
    p, q = table(3, 30 + seed), table(3, 40 + seed)

    def mean(sampler, rule, widths):
        return mean_length(verify_law(VERIFIERS[rule], proposer(sampler, q, widths), p))

    chain, tree, apart = (1, 1, 1), (2, 2), "without-replacement"
    assert mean("iid", "block", chain) >= mean("iid", "multi-step", chain) - EXACT
    assert mean("iid", "multi-step", tree) >= mean("iid", "naive", tree) - EXACT  # SpecInfer, Theorem 4.3
    # not proved for trees, but true of every pair tried
    assert mean("iid", "traversal", tree) >= mean("iid", "multi-step", tree)
    assert mean(apart, "traversal", tree) >= mean(apart, "recursive", tree) >= mean("iid", "multi-step", tree)
    assert mean("iid", "traversal", (2,)) == pytest.approx(mean("iid", "multi-step", (2,)), abs=EXACT)


# --- several proposers


def merged(*grown: Proposal) -> Proposal:
    for proposal in grown:
        if isinstance(proposal, Grown):
            proposal.draws = dict(proposal._asked)
    return Proposal.merge([plain(proposal) for proposal in grown])


def plain(p: Proposal) -> Proposal:
    return Proposal(p.tokens, p.parents, p.depths, p.ranks, None, None, p.proposer, draws=p.draws)


FIXED = Proposal([0, 1, 2, 0, 1], [-1, 0, 1, 0, 3], [0, 1, 2, 1, 2], [0, 0, 0, 1, 0], proposer="ngram")


@pytest.mark.parametrize("widths", [(1, 1), (2,)])
@pytest.mark.parametrize(("sampler", "rule"), [pair for pair in ALLOWED if pair[0] != "top-k"])
def test_two_drafts_merged(sampler, rule, widths):
    p, one, other = table(3, 13), table(3, 14), table(3, 15, zeros=0.3)

    def propose(chance: Chance) -> Proposal:
        return merged(*(Grown(q, widths, SAMPLERS[sampler], chance) for q in (one, other)))

    found = verify_law(VERIFIERS[rule], propose, p)
    assert error(completed(found, p, 3), target_law(p, 3)) < EXACT


@pytest.mark.parametrize(("sampler", "rule"), [pair for pair in ALLOWED if pair[0] != "top-k"])
def test_a_draft_merged_with_proposals_made_without_chance(sampler, rule):
    p, q = table(3, 16, zeros=0.2), table(3, 17)

    def propose(chance: Chance) -> Proposal:
        return merged(FIXED, Grown(q, (2, 1), SAMPLERS[sampler], chance))

    found = verify_law(VERIFIERS[rule], propose, p)
    assert error(completed(found, p, 3), target_law(p, 3)) < EXACT


@pytest.mark.parametrize("rule", TREE_RULES)
def test_proposals_made_without_chance_fit_every_rule(rule):
    p = table(3, 18, zeros=0.2)
    found = verify_law(VERIFIERS[rule], lambda chance: FIXED, p)
    assert error(completed(found, p, 3), target_law(p, 3)) < EXACT
    naive = verify_law(VERIFIERS["naive"], lambda chance: FIXED, p)
    assert mean_length(found) >= mean_length(naive) - EXACT


# --- the refused pairs, and other things that would be wrong


def worst_error(sampler: str, rule: str, samples: int, width: int = 3, vocab_size: int = 5) -> float:
    generator = np.random.default_rng(0)
    rows = [generator.dirichlet(np.ones(vocab_size), 2) for _ in range(samples)]
    return max(next_token_error(sampler, rule, p, q, width) for p, q in rows)


@pytest.mark.parametrize(("sampler", "rule"), REFUSED)
def test_refused_pairs_are_biased(sampler, rule):
    assert worst_error(sampler, rule, 12) > 0.05


@pytest.mark.rare
@pytest.mark.slow
def test_the_measured_table():
    """With -s it prints the table of docs/verification.md, which is of 200 samples."""
    samples = int(os.environ.get("TREESPEC_SAMPLES", "40"))
    errors = {pair: worst_error(*pair, samples) for pair in PAIRS}
    for (sampler, rule), worst in errors.items():
        print(f"| {sampler} | {rule} | {worst:.2g} | {'lossless' if worst < EXACT else 'refused'} |")
    assert {pair for pair, worst in errors.items() if worst < EXACT} == set(ALLOWED)
    assert errors["without-replacement", "multi-step"] > 0.3
    assert errors["top-k", "multi-step"] > 0.6
    assert errors["top-k", "recursive"] > 0.5


def test_children_dropped_after_they_were_drawn_are_biased():
    """Why policies choose widths before the draws: here the less likely of two drawn children is dropped."""
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.3, 0.2])

    def propose(chance: Chance) -> Proposal:
        proposal = Grown(lambda _: q, (2,), SAMPLERS["iid"], chance)
        children = proposal.get(0, [])[0].children
        best = max(children, key=lambda node: q[proposal.tokens[node]])
        proposal._asked[0] = [Draws([best], q)]
        return proposal

    found = verify_law(MultiStep(), propose, lambda _: p)
    assert error(completed(found, lambda _: p, 1), {(t,): x for t, x in enumerate(p)}) > 0.05


def test_children_sorted_by_probability_are_biased():
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.3, 0.2])

    def propose(chance: Chance) -> Proposal:
        proposal = Grown(lambda _: q, (2,), SAMPLERS["without-replacement"], chance)
        proposal.get(0, [])[0].children.sort(key=lambda node: -q[proposal.tokens[node]])
        return proposal

    found = verify_law(VERIFIERS["recursive"], propose, lambda _: p)
    assert error(completed(found, lambda _: p, 1), {(t,): x for t, x in enumerate(p)}) > 0.01


# --- the real source of randomness


def test_outcomes_add_up_and_are_the_laws_of_the_draws():
    weights = np.array([0.5, 0.0, 0.2, 0.3])
    found = dict.fromkeys([(i, j) for i in range(4) for j in range(4)], 0.0)
    for pair, probability in outcomes(lambda chance: tuple(chance.distinct(weights, 2))):
        found[pair] += probability
    assert found[0, 2] == pytest.approx(0.5 * 0.2 / 0.5) and found[3, 0] == pytest.approx(0.3 * 0.5 / 0.7)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("repeats", [REPEATS, 1, 0])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_pseudo_random_draws_have_the_enumerated_law(monkeypatch, kind, repeats):
    monkeypatch.setattr(
        "treespec_compiler.speculation.sampling.chance.REPEATS", repeats
    )  # fewer: the race draws the rest
    weights, count = np.array([0.35, 0.0, 0.05, 0.4, 0.2]), 20_000
    expected: dict[tuple[int, ...], float] = {}
    for drawn, probability in outcomes(lambda chance: tuple(SAMPLERS[kind].draw(weights, 3, chance))):
        expected[drawn] = expected.get(drawn, 0.0) + probability
    chance = SeededChance(7)
    seen = dict.fromkeys(expected, 0)
    for _ in range(count):
        seen[tuple(SAMPLERS[kind].draw(weights, 3, chance))] += 1
    chi_square = sum((seen[drawn] - count * x) ** 2 / (count * x) for drawn, x in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 1e-9


def test_pseudo_random_decisions():
    chance = SeededChance(1)
    assert sum(chance.accept(0.3) for _ in range(10_000)) == pytest.approx(3000, abs=200)
    assert chance.accept(1.0) and chance.accept(1.5) and not chance.accept(0.0) and not chance.accept(-1.0)
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    assert sum(chance.choose(weights) == 1 for _ in range(10_000)) == pytest.approx(2500, abs=200)
    assert {chance.choose(weights) for _ in range(100)} == {1, 3} == set(chance.repeated(weights, 100))
    assert sorted(chance.distinct(weights, 4)) == [1, 3]


def test_a_chain_as_long_as_contexts_are_deep():
    """Traversal keeps its own stack: no recursion limit."""
    depth = 3000
    tokens = [0] * (depth + 1)
    chain = Proposal(tokens, [*range(-1, depth)], [*range(depth + 1)], tokens)
    p = np.array([0.999, 0.001])
    verdict = TraversalVerification().verify(chain, lambda node: p, SeededChance(0))
    assert verdict.path == [*range(len(verdict.path))]
