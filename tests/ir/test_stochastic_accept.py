"""The op's definition against the verifiers of the runtime: given the same numbers, the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import Listed, as_tensors, distribution, levels, random_proposal

from treespec_compiler.ir.stochastic_accept import FIELDS, stochastic_accept
from treespec_compiler.speculation.verifiers import VERIFIERS

PAIRS = [
    ("naive", "top-k"),
    ("naive", "iid"),
    ("multi-step", "iid"),
    ("multi-step", "top-k"),  # one-hot draws: not a pair that is offered, but the rule is defined
    ("recursive", "without-replacement"),
    ("recursive", "top-k"),
    ("traversal", "without-replacement"),
    ("traversal", "top-k"),
]


@pytest.mark.parametrize(("rule", "sampler"), PAIRS)
def test_the_op_says_what_the_verifier_says(rule: str, sampler: str) -> None:
    rng, below_root, rejected = np.random.default_rng(1), 0, 0
    for trial in range(60):
        vocab_size = int(rng.integers(2, 12))
        proposals, targets = [], []
        for _ in range(1 + trial % 3):
            p = [distribution(rng, vocab_size) for _ in range(int(rng.integers(1, 12)))]
            proposers = 1 if rule == "traversal" else 1 + trial % 2  # two might draw one node
            proposals.append(random_proposal(rng, p, sampler, proposers=proposers))
            targets.append(p[: len(proposals[-1])])
        tensors = as_tensors(proposals, vocab_size)
        p = torch.from_numpy(np.array([row for rows in targets for row in rows]))
        uniforms = torch.from_numpy(rng.random((len(proposals), len(p) + len(tensors[-1]))))
        got = stochastic_accept(p, *tensors, uniforms, rule, levels(proposals)).tolist()
        for r, (proposal, rows) in enumerate(zip(proposals, targets)):
            chance = Listed(uniforms[r].tolist())
            want = VERIFIERS[rule].verify(proposal, lambda node, rows=rows: rows[node], chance)
            length, bonus, used = got[FIELDS * r : FIELDS * (r + 1)]
            first = FIELDS * len(proposals) + int(tensors[3][r])
            assert got[first : first + length] == want.path
            assert got[first + length : first + len(proposal)] == [-1] * (len(proposal) - length)
            assert (bonus, used) == (want.bonus, chance.used)
            below_root += length - 1
            rejected += used > length
    assert below_root > 20
    assert rejected > 10 or rule == "naive"


def test_a_token_without_weight_is_never_chosen() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    empty = torch.empty(0, dtype=torch.int64)
    for u in (0.0, 0.5, 1.0 - 2.0**-53):
        uniforms = torch.tensor([[u]], dtype=torch.float64)
        zero, offsets = torch.tensor([0]), torch.tensor([0, 1])
        out = stochastic_accept(p, p[:0], zero, -1 - zero, offsets, 0 * offsets, empty, empty, uniforms, "naive", 1)
        assert out.tolist() == [1, 1, 1, 0]


def test_what_is_refused() -> None:
    p = torch.ones(1, 1, dtype=torch.float64)
    index = torch.zeros(1, dtype=torch.int64)
    offsets = torch.tensor([0, 1])
    rest = (index, index, offsets, 0 * offsets, index[:0], index[:0])
    with pytest.raises(ValueError, match="got rule 'block', expected one of naive"):
        stochastic_accept(p, p, *rest, p, "block", 1)
    with pytest.raises(ValueError, match="expected float64"):
        stochastic_accept(p.float(), p, *rest, p, "naive", 1)
    with pytest.raises(ValueError, match="got 0 uniform numbers a request, expected 1"):
        stochastic_accept(p, p, *rest, p[:, :0], "naive", 1)


def test_the_op_is_wellformed() -> None:
    p = torch.full((2, 4), 0.25, dtype=torch.float64)
    integers = [[0, 1], [-1, 0], [0, 2], [0, 1, 1], [1], [0]]
    tensors = [torch.tensor(numbers) for numbers in integers]
    uniforms = torch.rand(1, 3, dtype=torch.float64)
    torch.library.opcheck(stochastic_accept, (p, p[:1], *tensors, uniforms, "multi-step", 2))
