"""Judges decoders drawn at random: exact, refused, wrong or crashed. A seed and a number give one decoder again."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from composed import VOCAB, Recipe, build, recipe
from oracles import EAGER, error, random_tree

import treespec_compiler as treespec

EXACT, WRONG, CRASHED = "exact", "wrong", "crashed"
# float32 on a random decoder: about as far as two orders of summation are from each other.
TOLERANCE = 1e-4
PROMPTS = (0, 1, 3, 40, 150)


@dataclass(frozen=True)
class Verdict:
    kind: str
    """EXACT, WRONG, CRASHED, or the kind of the refusal."""
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.kind in (WRONG, CRASHED)


def drawn(seed: int, number: int) -> tuple[Recipe, int]:
    """Decoder `number` of a seed, whichever others are drawn: its parts, and the seed of its weights."""
    rng = random.Random(f"{seed} {number}")
    return recipe(rng), rng.randrange(1 << 30)


def judge(parts: Recipe, seed: int) -> Verdict:
    """Convert the decoder and compare trees behind prompts of several lengths with it, by every path."""
    torch._dynamo.reset()
    model = build(parts, seed)
    try:
        program = treespec.tree_program(model, options=EAGER)
        found = [_compare(model, program, prompt, seed) for prompt in PROMPTS]
    except treespec.Unsupported as refusal:
        return Verdict(str(refusal.kind), refusal.reason)
    except Exception as failure:
        return Verdict(CRASHED, f"{type(failure).__name__}: {str(failure)[:200]}")
    wrong = next(filter(None, found), None)
    return Verdict(WRONG, wrong) if wrong else Verdict(EXACT)


def _compare(model: torch.nn.Module, program: treespec.TreeProgram, prompt: int, seed: int) -> str | None:
    """Which row is not the model's; None: all are."""
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
        if not error(rows[node], wanted) <= TOLERANCE:
            return f"after {len(prefix)} tokens, node {node}: {error(rows[node], wanted):.1e}"
    return None
