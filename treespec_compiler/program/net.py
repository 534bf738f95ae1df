"""The net under all proofs: a program is compared with its model before it is used, as it will run.

Every row of two trees, behind a prefix that is longer than any number in the graph and with a commit between them, is
compared with the eager model on the path to the node (the path oracle).
"""

from __future__ import annotations

import random
import time
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ..capture.call import CallSpec
from ..errors import Refusal, Unsupported
from ..logs import logger
from ..passes.framework.state import GraphState
from ..tree import TokenTree
from .cache import TreeCache
from .rounding import is_rounding, relative_error
from .semantics import eager_rows, kept

log = logger(__name__)

PREFIX = 257  # past one chunk of a prompt, and past the windows and buckets of most models
MOST = 600  # longer literals are left to the proofs: the eager model's time grows with them
TREE = ([-1, 0, 0, 1, 3], [-1, 0, -1])  # parents of the two trees


class Runs(Protocol):
    """What is needed of a tree program: its graph, its limits, and that it runs."""

    vocab_size: int
    device: torch.device

    @property
    def state(self) -> GraphState: ...

    @property
    def graph_module(self) -> fx.GraphModule: ...

    @property
    def input_vocab(self) -> int: ...

    @property
    def max_context(self) -> int | None: ...

    def prefill(self, prompt_ids: Any, cache: TreeCache) -> Tensor: ...

    def verify(self, tree: Any, cache: TreeCache) -> Tensor: ...

    def unchecked_cache(self, max_tokens: int, slots: int) -> TreeCache: ...


def check_program(program: Runs, model: nn.Module, call: CallSpec) -> float:
    """Seconds it took; raises `Unsupported` where a row is not the model's, on two prompts of two."""
    began = time.perf_counter()
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        log.info("weights on meta: the program cannot be compared with the model")
        return 0.0
    with kept(model, program.state.caches):
        found = _difference(program, model, call, seed=0)
        # NOTE routing may flip where two experts are as good, on one prompt; a wrong program is so on both.
        if found is not None and _difference(program, model, call, seed=1) is not None:
            raise Unsupported(
                Refusal.BRANCH,
                f"the program does not compute what the model does: {found}",
                way_out='report it with the model\'s code; option verify="off" leaves the comparison out',
            )
    return time.perf_counter() - began


def _difference(program: Runs, model: nn.Module, call: CallSpec, seed: int) -> str | None:
    rng, spec = random.Random(seed), program.state.model_logits
    nodes = sum(map(len, TREE))
    length = min(max(PREFIX, _literal(program) + 2), MOST, (program.max_context or MOST + nodes) - nodes)
    if length < 1:
        return None
    draw = [rng.randrange(min(program.input_vocab, program.vocab_size)) for _ in range(length + nodes)]
    prefix, fresh = draw[:length], iter(draw[length:])
    cache = program.unchecked_cache(length + 2 * nodes, 1)
    # One run of the model gives every row of a path: the prefix's own last row belongs to the first one.
    first = program.prefill(prefix, cache).clone()
    paths: list[tuple[list[int], dict[int, Tensor]]] = []  # token ids, and the program's row after each of some of them
    for parents in TREE:
        tree = TokenTree([next(fresh) for _ in parents], parents)
        got = program.verify(tree, cache).clone()
        for leaf in (i for i in range(len(tree)) if i not in parents):
            ids = prefix + tree.path_tokens(leaf)
            paths.append((ids, {len(prefix) + depth: got[node] for depth, node in enumerate(tree.path(leaf))}))
        path = tree.path(len(tree) - 1)
        cache.commit(path)
        prefix = prefix + [tree.tokens[i] for i in path]
    paths[0][1][length - 1] = first
    for ids, rows in paths:
        expected = eager_rows(model, call, ids, rows, program.device, spec)
        for at, row in rows.items():
            if not is_rounding(model, call, ids[: at + 1], row, expected[at], spec):
                error = relative_error(row, expected[at])
                return f"logits after {at + 1} tokens differ by {error:.2e} of the largest"
    return None


def _literal(program: Runs) -> int:
    """The largest number in the graph that could be one of tokens."""
    found = [0]
    for node in program.graph_module.graph.nodes:
        found += [a for a in node.args if type(a) is int and a <= MOST - 2]
    return max(found)
