"""Sampling that leaves rows on the device: the same distributions, draws and tokens as row by row on the host.

The device is the CPU here, and its kernels the ops' definitions; tests/codegen/interpreter compares those with
the kernels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from fake_program import FakeProgram, table_row
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidLogits
from treespec_compiler.ir import ops
from treespec_compiler.speculation.proposal import Draws, Proposal
from treespec_compiler.speculation.sampling import device_rows
from treespec_compiler.speculation.sampling.chance import SeededChance
from treespec_compiler.speculation.sampling.device_rows import DeviceProcessor, DeviceRows
from treespec_compiler.speculation.sampling.rows import HostRows
from treespec_compiler.speculation.sampling.samplers import SAMPLERS
from treespec_compiler.speculation.sampling.settings import Processor, Sampling
from treespec_compiler.speculation.verifiers import judge, on_device

CPU = torch.device("cpu")
SAMPLINGS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "penalty": {"temperature": 0.9, "repetition_penalty": 1.6},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0, 7: -math.inf, 500: 1.0}},
    "greedy with a bias": {"temperature": 0.0, "logit_bias": {2: 1.5}},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.7,
            "logit_bias": {1: -0.5}},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_distributions(name: str, dtype: torch.dtype) -> None:
    sampling, vocab_size = Sampling(**SAMPLINGS[name]), 40
    logits = (3 * torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2] = logits[2].round()  # ties
    there, here = DeviceProcessor(sampling, CPU), Processor(sampling)
    for accepted in ([5, 900, 5], [11], []):
        there.accept(accepted), here.accept(accepted)
        paths = [[i, i + 1, 700][: i % 4] for i in range(6)]
        p, usable = there.rows(logits, paths)
        assert usable.all() and p.dtype == torch.float64
        for i, path in enumerate(paths):
            want = here.row(logits[i].float().numpy(), path)
            assert want is not None and ((p[i] > 0).numpy() == (want > 0)).all()
            np.testing.assert_allclose(p[i].numpy(), want, rtol=1e-12, atol=1e-15)


def test_unusable_rows() -> None:
    logits = torch.randn(5, 8)
    logits[0, 3], logits[1, 0], logits[2], logits[3, 4] = math.nan, math.inf, -math.inf, -math.inf
    p, usable = DeviceProcessor(Sampling(temperature=1.0, top_p=0.5), CPU).rows(logits)
    assert usable.tolist() == [False, False, False, True, True]
    assert p.isfinite().all()


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("name", ["temperature", "top-k", "all"])
def test_the_same_numbers_draw_the_same_children(kind: str, name: str) -> None:
    """Rows that are unusable, that nothing is asked of, and that need a race behind them included."""
    sampling, vocab_size = Sampling(**SAMPLINGS[name]), 12
    chances = SeededChance(3), SeededChance(3)
    here = HostRows(sampling, SAMPLERS[kind], chances[0], vocab_size + 2)
    there = DeviceRows(sampling, SAMPLERS[kind].kind, chances[1], vocab_size + 2, CPU)
    random, races = torch.Generator().manual_seed(1), 0
    for trial in range(60):
        logits = torch.randn(5, vocab_size, generator=random) * (1 + 9 * (trial % 3))
        if trial % 4 == 0:
            logits[trial % 5] = math.nan
        counts = [3, 0, 1, 5, 2] if trial % 2 else [2, 4, 4, 4, 1]
        paths = [[i] for i in range(5)] if here.needs_paths else None
        want, got = here.draw(logits, counts, paths), there.draw(logits, counts, paths)
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            assert (a is None) == (b is None) == (bool(logits[i].isnan().any()) and counts[i] > 0)
            if a is None or b is None:
                continue
            assert a.tokens == b.tokens and len(a.tokens) <= counts[i]
            np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-12)
            np.testing.assert_allclose(np.asarray(a.q), np.asarray(b.q), rtol=1e-12, atol=1e-15)
            races += kind == "without-replacement" and len(a.tokens) == counts[i] > 3
        here.accept([trial % vocab_size]), there.accept([trial % vocab_size])
    assert chances[0].peek(3).tolist() == chances[1].peek(3).tolist()
    assert races or kind != "without-replacement"


def test_numbers_that_were_looked_at_stay_the_next_ones() -> None:
    plain, looked = SeededChance(5), SeededChance(5)
    weights = np.arange(9.0)
    ahead = looked.peek(4)
    assert looked.peek(2).tolist() == ahead[:2].tolist()
    looked.skip(1)
    assert plain.peek(1).tolist() == ahead[:1].tolist()
    plain.skip(1)
    for _ in range(3):
        assert plain.choose(weights) == looked.choose(weights)
        assert plain.distinct(weights, 3) == looked.distinct(weights, 3)
        assert plain.repeated(weights, 2) == looked.repeated(weights, 2)
        assert plain.accept(0.3) == looked.accept(0.3)
        looked.peek(7)


def test_a_number_at_the_end_chooses_the_last_token_with_a_weight() -> None:
    chance = SeededChance(0)
    chance._ahead.extend([1.0 - 2.0**-53] * 40)
    weights = np.array([0.1] * 3 + [0.0] * 4)
    assert chance.choose(weights) == 2 and chance.repeated(weights, 2) == [2, 2]


# -- whole requests --------------------------------------------------------------------------------------------------

VOCAB = 13
PAIRS = [
    ("naive", "top-k"),
    ("naive", "iid"),
    ("multi-step", "iid"),
    ("recursive", "without-replacement"),
    ("traversal", "without-replacement"),
    ("traversal", "iid"),  # one drawn twice: read row by row
    ("block", "iid"),  # no kernel
]


@functools.cache
def row(seed: int) -> Any:
    return functools.cache(table_row(VOCAB, seed))


@functools.cache
def draft_row() -> Any:
    return functools.cache(table_row(VOCAB, 2, agree_with=row(1), agreement=0.6))


class There(FakeProgram):
    """On a device, to those who ask for it."""


@pytest.fixture
def device(monkeypatch: Any) -> list[str]:
    """Programs of type `There` have kernels of their own; the rules that these were called with."""
    rules: list[str] = []

    def kernel(*arguments: Any) -> Tensor:
        rules.append(arguments[-2])
        return ops.stochastic_accept(*arguments)

    def found(program: Any, op: Any, dtype: Any) -> Any:
        return kernel if isinstance(program, There) and op is ops.stochastic_accept else None

    monkeypatch.setattr(judge, "accept_kernel", found)
    monkeypatch.setattr(device_rows, "stays_on_device", lambda program: isinstance(program, There))
    return rules


@pytest.mark.parametrize("name", ["temperature", "penalty", "all", "greedy with a bias"])
@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_a_seed_gives_the_same_tokens(device: list[str], verifier: str, sampler: str, name: str) -> None:
    arguments = {"max_new_tokens": 60, "seed": 11, "eos_token_id": (), **SAMPLINGS[name]}
    if not (name.startswith("greedy")):
        arguments |= {"verifier": verifier, "sampler": sampler}
    arguments["policy"] = "1,1,1" if verifier == "block" else "2,2,1"
    outputs = []
    for targets, drafts in ((FakeProgram, FakeProgram), (There, There), (There, FakeProgram), (FakeProgram, There)):
        out = treespec.generate(targets(row(1), VOCAB), [1, 2, 3], draft=drafts(draft_row(), VOCAB), **arguments)
        outputs.append((out.sequences.tolist(), out.stats.steps, out.stats.accepted))
    assert outputs[1:] == outputs[:1] * 3
    expected = "naive" if name.startswith("greedy") else verifier
    assert set(device) <= {"naive", expected}
    if (verifier, sampler) in PAIRS[:5]:
        assert device.count(expected) > 5


def test_several_drafts_and_draws_without_chance(device: list[str]) -> None:
    arguments = {"max_new_tokens": 50, "seed": 4, "eos_token_id": (), "temperature": 0.9, "policy": "2,1"}
    outputs = [
        treespec.generate(
            kind(row(1), VOCAB), [1, 2, 3, 1, 2], draft=[kind(draft_row(), VOCAB), "ngram"],
            verifier="multi-step", sampler="iid", **arguments,
        ).sequences.tolist()
        for kind in (FakeProgram, There)
    ]  # fmt: skip
    assert outputs[0] == outputs[1] and "multi-step" in device


def test_which_proposals_the_kernels_take() -> None:
    def proposal(*draws: Draws) -> Proposal:
        return Proposal([0, 1, 2], [-1, 0, 0], [0, 1, 1], [0, 0, 1], draws={0: list(draws)})

    q = np.full(4, 0.25)
    distinct, twice = Draws([1, 2], q, replacement=False), Draws([1, 2], q, replacement=True)
    assert on_device.takes("traversal", proposal(distinct))
    assert on_device.takes("traversal", proposal(Draws([1], q), Draws([2], q)))
    assert on_device.takes("traversal", proposal(Draws([1, 2], None)))
    assert not on_device.takes("traversal", proposal(twice))  # the second is from q itself, not from what is left of it
    assert not on_device.takes("traversal", proposal(distinct, Draws([1], q)))  # one node, two ways to reach it
    assert on_device.takes("multi-step", proposal(twice)) and not on_device.takes("block", proposal(distinct))


@pytest.mark.parametrize(("rule", "depth"), [("recursive", -1), ("traversal", 1)])
def test_traversal_looks_at_nodes_beside_the_path(rule: str, depth: int) -> None:
    q = np.array([0.0, 0.5, 0.5])
    proposal = Proposal([0, 1, 2], [-1, 0, 0], [0, 1, 1], [0, 0, 1], draws={0: [Draws([1, 2], q, replacement=False)]})
    p, usable = torch.tensor([[0.0, 1.0, 0.0]] * 3, dtype=torch.float64), torch.tensor([True, True, False])
    verdict = on_device.accept_by_chance(ops.stochastic_accept, rule, proposal, p, usable, SeededChance(0))
    assert verdict.path == [0, 1] and verdict.unusable == depth


@pytest.mark.parametrize("kind", [FakeProgram, There])
def test_unusable_logits_end_the_request(device: list[str], kind: type[FakeProgram]) -> None:
    def broken(tokens: tuple[int, ...]) -> Tensor:
        return row(1)(tokens) if len(tokens) < 9 else torch.full((VOCAB,), math.nan)

    with pytest.raises(InvalidLogits, match="NaN, infinite or only -inf logits after the token at position 8"):
        treespec.generate(
            kind(broken, VOCAB), [1, 2, 3], draft=kind(draft_row(), VOCAB), max_new_tokens=30, temperature=1.0, seed=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_a_gpu_draws_as_the_cpu_does(verifier: str, sampler: str) -> None:
    pytest.importorskip("transformers")
    same_sample_of_the_shipped_pair(torch.device("cuda"), verifier, sampler)


def same_sample_of_the_shipped_pair(device: torch.device, verifier: str, sampler: str) -> None:
    from treespec_compiler import demo

    prompt = demo.load_tokenizer().encode("def mean(values):\n    total = 0\n    for value in")
    arguments = {"max_new_tokens": 48, "seed": 1, "eos_token_id": (), "verifier": verifier, "sampler": sampler}
    arguments |= {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "policy": "1,1,1" if verifier == "block" else "2,2,1"}
    outputs = []
    for place in (CPU, device):
        target, draft = demo.load_target().to(place), demo.load_draft().to(place)
        out = treespec.generate(target, prompt, draft=draft, options={"lowering": "eager"}, **arguments)
        outputs.append((out.sequences.tolist(), out.stats.steps, out.stats.accepted))
    assert outputs[0] == outputs[1] and outputs[0][2] > 0
