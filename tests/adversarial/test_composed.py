"""Exact or refused: decoders nobody chose. A new seed in every run, printed; TREESPEC_SEED repeats one.

TREESPEC_DECODERS sets how many (200 in CI, 5000 on demand), in parts that run side by side. Each part prints its tally
at the end, with what repeats it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest
import torch
from composed import VOCAB, Recipe, build, recipe
from oracles import EAGER, error, random_tree

import treespec_compiler as treespec

SEED = int(os.environ.get("TREESPEC_SEED", time.time_ns() % 1_000_000_007))
DECODERS = int(os.environ.get("TREESPEC_DECODERS", "24"))
PARTS = 4
# float32 on a random decoder: about as far as two orders of summation are from each other.
TOLERANCE = 1e-4
PROMPTS = (0, 3, 40, 150)


def verdict(parts: Recipe, seed: int) -> str:
    """ "exact", or the kind of the refusal; raises AssertionError where a row is wrong."""
    model = build(parts, seed)
    try:
        program = treespec.tree_program(model, options=EAGER)
        for prompt in PROMPTS:
            _compare(model, program, prompt, seed)
    except treespec.Unsupported as refusal:
        return str(refusal.kind)
    return "exact"


def _compare(model: torch.nn.Module, program: treespec.TreeProgram, prompt: int, seed: int) -> None:
    rng = random.Random(seed + prompt)
    most = program.max_context or 1 << 20
    prefix = [rng.randrange(VOCAB) for _ in range(max(0, min(prompt, most - 7)))]
    tree = random_tree(7, VOCAB, seed)
    cache = program.new_cache(max_tokens=len(prefix) + 8)
    if prefix:
        program.prefill(prefix, cache)
    rows = program.verify(tree, cache)
    for node in range(len(tree)):
        path = prefix + tree.path_tokens(node)
        with torch.no_grad():
            wanted = model(torch.tensor([path]))[0, -1]
        assert error(rows[node], wanted) <= TOLERANCE, f"after {len(prefix)} tokens, node {node}"


@pytest.mark.parametrize("part", range(PARTS))
def test_exact_or_refused(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"{SEED} {part}")
    tally: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(part, DECODERS, PARTS):
        parts, seed = recipe(rng), rng.randrange(1 << 30)
        torch._dynamo.reset()
        try:
            tally[verdict(parts, seed)] += 1
        except Exception as failure:  # a wrong row, or anything but a refusal
            tally["wrong"] += 1
            wrong.append(f"decoder {number}: {parts}, {type(failure).__name__}: {str(failure)[:200]}")
    with capsys.disabled():
        print(f"\nTREESPEC_SEED={SEED} TREESPEC_DECODERS={DECODERS}, part {part}: {dict(tally.most_common())}")
    assert not wrong, f"TREESPEC_SEED={SEED}\n" + "\n".join(wrong)
