"""The path oracle: what a tree program must say, from the eager model alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treespec_compiler import Forest, TokenTree

EAGER = {"lowering": "eager"}
TOLERANCE = 1e-4  # of the largest |logit|, float32


def eager_row(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """The model's own next-token logits [V] after `ids`."""
    with torch.no_grad():
        out = model(torch.tensor([list(ids)]))
    logits: Any = getattr(out, "logits", None)
    if logits is None:
        logits = out if isinstance(out, Tensor) else out["logits"] if isinstance(out, dict) else out[0]
    return logits[0, -1]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_rows(
    model: nn.Module, rows: Tensor, tree: TokenTree, prefix: Sequence[int], nodes: Sequence[int] | None = None
) -> None:
    """`rows[i]` is what the model says after `prefix` and the path to node `nodes[i]` (default: node i)."""
    for row, node in enumerate(range(len(tree)) if nodes is None else nodes):
        path = [*prefix, *tree.path_tokens(node)]
        found = error(rows[row], eager_row(model, path))
        assert found <= TOLERANCE, f"node {node}, {len(path)} tokens: {found:.1e}"


def random_tree(size: int, vocab: int, seed: int, roots: float = 0.1) -> TokenTree:
    """A random tree; each node is one more root with probability `roots`."""
    rng = random.Random(seed)
    parents = [-1 if i == 0 or rng.random() < roots else rng.randrange(i) for i in range(size)]
    return TokenTree([rng.randrange(vocab) for _ in range(size)], parents)


def assert_decodes(
    model: nn.Module, program: Any, vocab: int, rounds: int = 3, size: int = 11, prompt: int = 7
) -> None:
    """Prefill, then rounds of verify and commit of a random root path: every row is the eager model's."""
    prefix = [(5 * i + 3) % vocab for i in range(prompt)]
    cache = program.new_cache(max_tokens=len(prefix) + (rounds + 1) * size)
    row = program.prefill(prefix, cache)
    assert error(row, eager_row(model, prefix)) <= TOLERANCE
    for seed in range(rounds):
        tree = random_tree(size, vocab, seed)
        assert_rows(model, program.verify(tree, cache), tree, prefix)
        path = tree.path(random.Random(seed).randrange(len(tree)))
        cache.commit(path)
        prefix = prefix + [tree.tokens[i] for i in path]
        assert cache.length(0) == len(prefix)


__all__ = ["EAGER", "TOLERANCE", "Forest", "assert_decodes", "assert_rows", "eager_row", "error", "random_tree"]
