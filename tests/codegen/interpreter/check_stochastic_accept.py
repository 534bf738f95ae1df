"""Acceptance by chance in kernels against its definition, which the verifiers are compared with elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import as_tensors, distribution, levels, random_proposal

from treespec_compiler.codegen.gpu import stochastic_accept as kernels
from treespec_compiler.ir.stochastic_accept import FIELDS, stochastic_accept

PAIRS = [
    ("naive", "iid", 1),
    ("multi-step", "iid", 1),
    ("multi-step", "iid", 2),
    ("multi-step", "top-k", 1),
    ("recursive", "without-replacement", 1),
    ("recursive", "without-replacement", 2),
    ("traversal", "without-replacement", 1),
    ("traversal", "top-k", 1),
]


def forest(rng, vocab_size, requests, sampler, proposers, most=8):
    proposals, targets = [], []
    for _ in range(requests):
        p = [distribution(rng, vocab_size) for _ in range(int(rng.integers(1, most)))]
        proposals.append(random_proposal(rng, p, sampler, proposers=proposers))
        targets += p[: len(proposals[-1])]
    tensors = as_tensors(proposals, vocab_size)
    uniforms = torch.from_numpy(rng.random((requests, len(targets) + len(tensors[-1]))))
    return torch.from_numpy(np.array(targets)), *tensors, uniforms, levels(proposals)


@pytest.mark.family
@pytest.mark.parametrize(("rule", "sampler", "proposers"), PAIRS)
def test_random_forests(rule, sampler, proposers, monkeypatch):
    """Blocks of 4 ids, so that rows have several of them and an end inside one."""
    rng, lengths = np.random.default_rng(2), []
    monkeypatch.setattr(kernels, "BLOCK", 4)
    for trial in range(5):
        *inputs, deep = forest(rng, int(rng.integers(2, 15)), 1 + trial % 3, sampler, proposers)
        want = stochastic_accept(*inputs, rule, deep)
        got = kernels.STOCHASTIC_ACCEPT(*inputs, rule, deep)
        assert got.tolist() == want.tolist()
        lengths += want[: FIELDS * (1 + trial % 3) : FIELDS].tolist()
    assert max(lengths) > 1


@pytest.mark.parametrize("rule", ["naive", "multi-step", "recursive", "traversal"])
def test_numbers_at_both_ends(rule):
    """0 accepts and chooses what it can; just below 1 chooses the last token that has a weight."""
    rng = np.random.default_rng(5)
    *inputs, uniforms, deep = forest(rng, 9, 2, "without-replacement", 1)
    for number in (0.0, 1.0 - 2.0**-53):
        numbers = torch.full_like(uniforms, number)
        want = stochastic_accept(*inputs, numbers, rule, deep)
        assert kernels.STOCHASTIC_ACCEPT(*inputs, numbers, rule, deep).tolist() == want.tolist()


def test_a_launch_reads_nothing_that_another_of_its_programs_writes(monkeypatch):
    """The interpreter runs a launch's programs one after the other, a GPU side by side: launch k does no node of a
    later level than k, though such nodes come behind their parents in the same launch."""
    rng = np.random.default_rng(3)
    p = [distribution(rng, 6) for _ in range(12)]
    proposal = random_proposal(rng, p, "without-replacement", proposers=1)
    deepest = max(proposal.depths)
    assert deepest > 1
    from treespec_compiler.codegen.gpu.kernels import stochastic_accept as fixed

    real, done = fixed.residual_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                real[grid](*args, **options)
                last = args[real.arg_names.index("last_weights")]
                done.append([node for node in range(len(proposal)) if last[node] >= 0.0])

            return launch

    monkeypatch.setattr(fixed, "residual_kernel", Watched())
    tensors = as_tensors([proposal], 6)
    uniforms = torch.from_numpy(rng.random((1, len(proposal) + len(tensors[-1]))))
    kernels.STOCHASTIC_ACCEPT(
        torch.from_numpy(np.array(p[: len(proposal)])), *tensors, uniforms, "traversal", levels([proposal])
    )
    reached = [[node for node, depth in enumerate(proposal.depths) if depth <= level] for level in range(deepest + 1)]
    # Draws of probability zero end a path: below them nothing is looked at.
    assert all(set(found) <= set(expected) for found, expected in zip(done, reached, strict=True))
    assert len(done[0]) == 1 < len(done[1])
