"""Greedy acceptance as an op, and the runtime's use of it: the same verdicts as the verifier that reads the logits."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_program import FakeProgram

import treespec_compiler as treespec
import treespec_compiler.codegen
from treespec_compiler.errors import InvalidLogits, InvalidTree
from treespec_compiler.ir import ops, registry
from treespec_compiler.speculation.proposal import Proposal
from treespec_compiler.speculation.verifiers import judge
from treespec_compiler.speculation.verifiers.greedy import GreedyVerifier
from treespec_compiler.speculation.verifiers.near_ties import TOLERANCE, near_tie
from treespec_compiler.speculation.verifiers.on_device import accept_greedily, accept_kernel

VOCAB = 11


def random_proposal(rng: random.Random, logits: torch.Tensor) -> Proposal:
    count = len(logits)
    parents = [-1, *(rng.randrange(max(0, i - 3), i) for i in range(1, count))]
    choices = logits.argmax(-1).tolist()
    tokens = [choices[p] if rng.random() < 0.7 else rng.randrange(VOCAB) for p in parents]
    return Proposal(tokens, parents, [0] * count, [0] * count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_says_what_the_verifier_says(dtype: torch.dtype) -> None:
    rng, accepted = random.Random(0), 0
    for trial in range(200):
        logits = torch.randint(-3, 4, (rng.randrange(1, 10), VOCAB)).to(dtype)  # ties in most rows
        proposal = random_proposal(rng, logits)
        if trial % 3 == 0:
            logits[rng.randrange(len(logits)), rng.randrange(VOCAB)] = rng.choice([torch.nan, torch.inf])
        if trial % 7 == 0:
            logits[rng.randrange(len(logits))] = -torch.inf
        want, got = GreedyVerifier().verify(proposal, logits), accept_greedily(ops.greedy_accept, proposal, logits)
        assert (got.path, got.bonus, got.unusable) == (want.path, want.bonus, want.unusable)
        if dtype in TOLERANCE and want.unusable < 0:
            assert got.near_tie == near_tie(logits, want.path, TOLERANCE[dtype])
        accepted += len(want.path)
    assert accepted > 400  # the walks went below the roots


def test_several_roots_are_refused() -> None:
    with pytest.raises(InvalidTree, match="several roots"):
        accept_greedily(ops.greedy_accept, Proposal([1, 2], [-1, -1], [0, 0], [0, 0]), torch.zeros(2, VOCAB))


def test_nothing_is_near_a_logit_that_stands_alone() -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 2] = 3.0
    assert not near_tie(logits, [0], 2.0**-7)


def test_the_op_is_wellformed() -> None:
    offsets = torch.tensor([0, 2, 3])
    inputs = (torch.randn(3, VOCAB), torch.tensor([1, 2, 3]), torch.tensor([-1, 0, -1]), offsets, 2.0**-7)
    torch.library.opcheck(ops.greedy_accept, inputs)


def row(tokens: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(tokens) % 2**31)
    return torch.randint(0, 9, (VOCAB,), generator=generator).float()


def generated(dtype: torch.dtype) -> Any:
    program, draft = (FakeProgram(lambda tokens: row(tokens).to(dtype), VOCAB) for _ in range(2))
    program.dtype = draft.dtype = dtype
    return treespec.generate(program, [1, 2, 3], draft=draft, max_new_tokens=40, policy=(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_is_the_same_with_acceptance_on_the_device(dtype: torch.dtype, monkeypatch: Any) -> None:
    want = generated(dtype)
    calls = []

    def kernel(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return ops.greedy_accept(*arguments)

    monkeypatch.setattr(judge, "accept_kernel", lambda program, op, dtype: kernel)
    got = generated(dtype)
    assert len(calls) == got.stats.steps > 3
    assert got.sequences.tolist() == want.sequences.tolist()
    assert (got.stats.steps, got.stats.near_ties) == (want.stats.steps, want.stats.near_ties)
    assert (got.stats.near_ties > 0) == (dtype is torch.bfloat16)


def test_unusable_logits_end_the_request(monkeypatch: Any) -> None:
    def broken(tokens: tuple[int, ...]) -> torch.Tensor:
        return row(tokens) if len(tokens) < 6 else torch.full((VOCAB,), torch.nan)

    messages = []
    for kernel in (None, ops.greedy_accept):
        monkeypatch.setattr(judge, "accept_kernel", lambda program, op, dtype, kernel=kernel: kernel)
        with pytest.raises(InvalidLogits) as error:
            treespec.generate(FakeProgram(broken, VOCAB), [1, 2, 3], max_new_tokens=20)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_who_accepts() -> None:
    def kernel_for(device: str, dtype: torch.dtype, kernels: str = "auto") -> Any:
        program: Any = SimpleNamespace(
            device=torch.device(device), dtype=dtype, options=treespec.Options(kernels=kernels)
        )
        return accept_kernel(program, ops.greedy_accept, dtype)

    assert kernel_for("cpu", torch.float32) is None
    assert kernel_for("cuda", torch.bfloat16, "aten") is None
    assert kernel_for("cuda", torch.float64) is None  # a key of 64 bits has no room for the id
    pytest.importorskip("triton", reason="needs triton")
    best = registry.best_kernel(ops.greedy_accept, "cuda", torch.bfloat16)
    assert best is not None and kernel_for("cuda", torch.bfloat16) is best.target


class Elsewhere:
    """Logits on another device: what is read is kept."""

    device = torch.device("cuda")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.read = logits, []

    def __getitem__(self, node: int) -> torch.Tensor:
        self.read.append(node)
        return self.logits[node]


def test_sampling_reads_the_rows_of_the_path_only() -> None:
    from treespec_compiler.speculation.sampling.chance import SeededChance
    from treespec_compiler.speculation.sampling.settings import Sampling
    from treespec_compiler.speculation.verifiers import VERIFIERS
    from treespec_compiler.speculation.verifiers.judge import SamplingJudge

    rng = random.Random(1)
    for seed in range(20):
        logits = 4 * torch.randn(12, VOCAB)
        proposal = random_proposal(rng, logits)
        judges = [SamplingJudge(VERIFIERS["naive"], Sampling(temperature=0.7), SeededChance(seed)) for _ in range(2)]
        there: Any = Elsewhere(logits)
        want, got = judges[0].verify(proposal, logits), judges[1].verify(proposal, there)
        assert got == want and there.read == want.path
