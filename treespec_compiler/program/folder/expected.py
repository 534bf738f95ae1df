"""Rows that the model itself gave, kept with its program: what a folder is compared with where there is no model.

A folder may be run on another machine, by other code lowered from its graph. So it holds two short prompts, each with a
tree behind it and the eager model's logits on its paths; the folder's program must give them before its first use.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...capture.call import CallSpec
from ...tree import TokenTree
from ..net import Runs
from ..own_choices import own_choices
from ..rounding import DRAWS, relative_error, tolerance
from ..saved.values import CannotLoad
from ..semantics import eager_rows, kept, seen_first
from ..target import as_target

PROMPT = 12
PARENTS = [-1, 0, 0, 2, 1, 3]
PREFIX = "expected_"
_MOST_ERROR = 0.1


@dataclass(frozen=True)
class Expected:
    """One prompt, a tree behind it, and the model's rows on the tree's nodes."""

    prompt: list[int]
    tree: TokenTree
    rows: Tensor
    """[N, V], or [1, V] of the prompt alone where the model has no room for more."""
    error: float
    """How far the program was from them where it was compiled, relative to the largest."""

    def difference(self, program: Runs) -> float | None:
        """How far the program is from the model here; None: no farther than rounding."""
        got = _rows(program, self.prompt, self.tree)
        finite = self.rows.isfinite()
        if not torch.equal(finite, got.isfinite()):
            return float("inf")
        if not finite.any():
            return None
        error = relative_error(got[finite].float(), self.rows[finite].float())
        return None if error <= tolerance(self.rows.dtype) + DRAWS * self.error else error


def expectations(program: Runs, model: nn.Module, call: CallSpec) -> list[Expected]:
    """What the model says; the program was compared with it."""
    found = []
    for seed in range(2):
        prompt, tree = _drawn(program, seed)
        spec = program.state.model_logits
        rows: dict[int, Tensor] = {}
        with kept(model, program.state.caches), as_target(model, program.state):
            for leaf in (i for i in range(len(tree)) if i not in tree.parents):
                path, ids = tree.path(leaf), [*prompt, *tree.path_tokens(leaf)]
                wanted = {len(prompt) + depth: node for depth, node in enumerate(path) if node not in rows}
                with own_choices(program.state):
                    there = eager_rows(model, call, ids, wanted, program.device, spec)
                rows |= {node: there[at] for at, node in wanted.items()}
        expected = torch.stack([rows[node] for node in range(len(tree))])
        got = _rows(program, prompt, tree)
        finite = expected.isfinite() & got.isfinite()
        error = relative_error(got[finite].float(), expected[finite].float()) if finite.any() else 0.0
        found.append(Expected(prompt, tree, expected, min(error, _MOST_ERROR)))
    return found


def _drawn(program: Runs, seed: int) -> tuple[list[int], TokenTree]:
    rng = random.Random(seed)
    vocab = min(program.input_vocab, program.vocab_size)
    room = program.max_context
    count = len(PARENTS) if room is None else max(1, min(len(PARENTS), room - 1))
    length = PROMPT if room is None else max(1, min(PROMPT, room - count))
    ids = seen_first([rng.randrange(vocab) for _ in range(length + count)], program.state.padding)
    return ids[:length], TokenTree(ids[length:], PARENTS[:count])


def _rows(program: Runs, prompt: list[int], tree: TokenTree) -> Tensor:
    cache = program.unchecked_cache(len(prompt) + len(tree), 1)
    program.prefill(prompt, cache)
    return program.verify(tree, cache).clone()


def expected_text(found: list[Expected]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(JSON, tensors by name)."""
    text = [
        {"prompt": one.prompt, "tokens": [*one.tree.tokens], "parents": [*one.tree.parents], "error": one.error}
        for one in found
    ]
    return text, {f"{PREFIX}{i}": one.rows for i, one in enumerate(found)}


def expected_of(text: list[dict[str, Any]], tensors: Mapping[str, Tensor], device: torch.device) -> list[Expected]:
    """The inverse. Raises CannotLoad, and what a file of another shape leads to."""
    found = []
    for i, one in enumerate(text):
        tree = TokenTree(one["tokens"], one["parents"])
        rows = tensors[f"{PREFIX}{i}"].to(device)
        if rows.dim() != 2 or len(rows) != len(tree) or not 0 <= one["error"] <= _MOST_ERROR:
            raise CannotLoad("expected rows of another shape than their tree")
        found.append(Expected(list(one["prompt"]), tree, rows, float(one["error"])))
    if not found:
        raise CannotLoad("no expected rows")
    return found
