"""The net under all proofs: a program is compared with its model before it is used, as it will run.

Two requests run side by side, one behind a prefix that is longer than any number in the graph, one behind a short
prefix. Each has a tree verified, a path of it committed, and another tree verified behind that. The rows of the long
one's committed path, whose nodes have hidden siblings between them, and every row of the short one are compared with
the eager model on the path to the node (the path oracle). So the model runs once on many tokens, and a few times on
few.

Graphs derived from a program (early exits, tapped hidden states) have no eager counterpart in the model. What they
give for a tree is compared with the same graph run op by op on each path alone, and their logits with the program's
where they have all of its layers.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ..capture.call import CallSpec
from ..errors import Refusal, Unsupported
from ..logs import logger
from ..passes.framework.state import GraphState
from ..tree import Forest, TokenTree
from .batch import Part
from .cache import TreeCache
from .executor import Executor
from .links import Link
from .own_choices import own_choices
from .rounding import DRAWS, Exact, Judged, judged, relative_error, tolerance
from .semantics import eager_rows, kept, seen_first
from .target import RoundedModel

log = logger(__name__)

# Tokens before the longer request's trees, more where numbers in the graph are larger.
PREFIX = 257  # past one chunk of a prompt, and past the windows and buckets of most models
FOUND_PREFIX = 33  # of a program that another process saved, which was compared behind more tokens then
MOST = 600  # longer literals are left to the proofs: the eager model's time grows with them
SHORT = 5  # tokens before the other request's trees
# Parents of the trees of both requests, in two rounds; the path to the last node is committed. It has siblings that it
# must not see before and between its nodes, so that a node's depth is not its number.
TREES = ([-1, 0, 0, 2, 1, 3], [-1, -1, 1])
VARIANT_PREFIX = 24


class Runs(Protocol):
    """What is needed of a tree program: its graph, its limits, and that it runs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def state(self) -> GraphState: ...

    @property
    def graph_module(self) -> fx.GraphModule: ...

    @property
    def input_vocab(self) -> int: ...

    @property
    def max_context(self) -> int | None: ...

    def prefill(self, prompt_ids: Any, cache: TreeCache, slot: int = 0) -> Tensor: ...

    def verify(self, tree: Any, cache: TreeCache) -> Tensor: ...

    def unchecked_cache(self, max_tokens: int, slots: int) -> TreeCache: ...


@dataclass
class Comparison:
    """What a comparison of a program with its model took, and how near they came to being apart."""

    seconds: float = 0.0
    """Lowering of the program included."""
    rows: int = 0
    """Of logits, that were compared."""
    tokens: int = 0
    """On the longest path that was."""
    worst: Judged = Judged(True)  # noqa: RUF009
    """Of the row that came nearest to what is allowed."""

    def __str__(self) -> str:
        if not self.rows:
            return "not compared with the model: its weights have no values"
        near, to = self.worst.error, "the model's"
        measured = "the model's own rounding was not measured"
        if self.worst.own is not None:
            to, measured = "float64's", f"the model itself is {self.worst.own:.1e} from it"
        return (
            f"{self.rows} rows behind up to {self.tokens} tokens in {self.seconds:.1f} s: at most {near:.1e} from "
            f"{to}, {self.worst.allowed:.1e} is taken for rounding ({measured})"
        )


@dataclass
class _Path:
    """Token ids, and the program's rows after some of them, by their number."""

    ids: list[int]
    rows: dict[int, Tensor]


def check_program(program: Runs, model: nn.Module, call: CallSpec, found_saved: bool = False) -> Comparison:
    """What it found; raises `Unsupported` where a row is not the model's, on two prompts of two.

    A program that was `found_saved` was compared before it was saved: here behind fewer tokens, and at first with a
    model that sees what it filled before.
    """
    began, found = time.perf_counter(), Comparison()
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        log.info("weights on meta: the program cannot be compared with the model")
        return found
    exact = Exact(model, call, program.state.model_logits)
    target = RoundedModel(model, program.state)

    def differs(seed: int, as_first: bool) -> str | None:
        prefix = FOUND_PREFIX if found_saved else PREFIX
        return _difference(program, model, call, exact, target, found, prefix, seed, as_first)

    with kept(model, program.state.caches):
        wrong = differs(0, as_first=not found_saved)
        # NOTE routing may flip where two experts are as good, on one prompt; a wrong program is so on both.
        if wrong is not None and differs(1, as_first=True) is not None:
            raise _refusal(f"the program does not compute what the model does: {wrong}")
    found.seconds = time.perf_counter() - began
    log.info("compared with the model: %s", found)
    return found


def _refusal(what: str) -> Unsupported:
    way_out = 'report it with the model\'s code; option verify="off" leaves the comparison out'
    return Unsupported(Refusal.BRANCH, what, way_out=way_out)


def _difference(
    program: Runs,
    model: nn.Module,
    call: CallSpec,
    exact: Exact,
    target: RoundedModel,
    found: Comparison,
    prefix: int,
    seed: int,
    as_first: bool,
) -> str | None:
    for path in _paths(program, prefix, seed):
        spec = program.state.model_logits
        # A model that gives the last token's logits alone runs anew for each row.
        wanted = path.rows if not spec.last else {at: path.rows[at] for at in (min(path.rows), max(path.rows))}
        with target.run(), own_choices(program.state):
            expected = eager_rows(model, call, path.ids, wanted, program.device, spec, as_first)
        for at, row in wanted.items():
            with target.run(), own_choices(program.state):
                result = judged(exact, path.ids, at, row, expected[at])
            if not result.rounded:
                error = relative_error(row, expected[at])
                return f"logits after {at + 1} tokens differ by {error:.2e} of the largest"
            found.rows, found.tokens = found.rows + 1, max(found.tokens, at + 1)
            found.worst = max(found.worst, result, key=_nearness)
    return None


def _nearness(result: Judged) -> tuple[float, float]:
    return result.error / result.allowed if result.allowed else 0.0, result.allowed


def _paths(program: Runs, prefix: int, seed: int) -> Iterator[_Path]:
    """What the program says on paths of two requests: the committed one of the long request, all of the short one."""
    nodes = sum(map(len, TREES))
    room = (program.max_context or MOST + nodes) - nodes
    long = min(max(prefix, _literal(program) + 2), MOST, room)
    lengths = [n for n in (long, min(SHORT, room)) if n > 0]
    if not lengths:
        return
    rng = random.Random(seed)
    vocab = min(program.input_vocab, program.vocab_size)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    cache = program.unchecked_cache(long + 2 * nodes, len(lengths))
    prefixes = [seen_first(draw(n), program.state.padding) for n in lengths]
    committed = [_Path(ids, {}) for ids in prefixes]
    for slot, path in enumerate(committed):
        path.rows[len(path.ids) - 1] = program.prefill(path.ids, cache, slot).clone()
    for parents in TREES:
        trees = [TokenTree(draw(len(parents)), parents) for _ in committed]
        rows = program.verify(Forest(list(enumerate(trees))), cache).clone()
        for slot, (path, tree) in enumerate(zip(committed, trees, strict=True)):
            own, begun = rows[slot * len(tree) : (slot + 1) * len(tree)], len(path.ids)
            if slot == len(committed) - 1:
                for leaf in (i for i in range(len(tree) - 1) if i not in parents):
                    found = {begun + depth: own[node] for depth, node in enumerate(tree.path(leaf))}
                    yield _Path([*path.ids, *tree.path_tokens(leaf)], found)
            last = tree.path(len(tree) - 1)
            path.rows |= {begun + depth: own[node] for depth, node in enumerate(last)}
            path.ids = [*path.ids, *(tree.tokens[node] for node in last)]
        cache.commit({slot: tree.path(len(tree) - 1) for slot, tree in enumerate(trees)})
    yield from committed


def _literal(program: Runs) -> int:
    """The largest number in the graph that could be one of tokens: a window, a chunk, or what is no tensor's width."""
    found, widths = [0], set[int]()
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        widths |= {s for s in value.shape if type(s) is int} if isinstance(value, Tensor) else set()
        found += [a for a in node.args if type(a) is int and a <= MOST - 2]
    reaches = [site.mask.reach for site in program.state.sites]
    largest = max([n for n in found if n not in widths] + [n for n in reaches if n <= MOST - 2] + [0])
    link = Link.of(program.state)  # of stages, all run the same calls
    return largest if link is None else link.largest(largest)


def check_variant(program: Runs, main: Executor, variant: Executor) -> float:
    """Seconds it took; raises `Unsupported` where a graph derived from the program's gives something else for a tree
    than for its paths, on two prompts of two.
    """
    began = time.perf_counter()
    found = _variant_difference(program, main, variant, seed=0)
    if found is not None and _variant_difference(program, main, variant, seed=1) is not None:
        raise _refusal(f"a graph derived from the program's does not compute what it is derived for: {found}")
    return time.perf_counter() - began


def _variant_difference(program: Runs, main: Executor, variant: Executor, seed: int) -> str | None:
    parents = TREES[0]
    length = min(VARIANT_PREFIX, (program.max_context or MOST) - len(parents))
    if length < 1:
        return None
    rng = random.Random(seed)
    draw = [rng.randrange(min(program.input_vocab, program.vocab_size)) for _ in range(length + len(parents))]
    draw = seen_first(draw, program.state.padding)
    prefix, tree = draw[:length], TokenTree(draw[length:], parents)
    cache, other = (program.unchecked_cache(len(draw), 1) for _ in range(2))
    program.prefill(prefix, cache)
    for each in (cache, other):
        each._reserve(0, len(draw) - each.length())
    part = [Part(0, tree)]
    names, full = variant.state.outputs, len(variant.state.sites) == len(main.state.sites)
    whole = main.run(part, cache)[0].clone() if full else None
    got = [value.clone() for value in variant.run(part, cache)]
    plain = variant.op_by_op()
    again: Callable[[], list[Tensor]] = functools.cache(lambda: [v.clone() for v in plain.run(part, cache)])
    if whole is not None and not _near(got[0], whole, lambda: again()[0]):
        return f"its logits differ by {relative_error(got[0], whole):.2e} of the largest from the program's"
    for leaf in (i for i in range(len(tree)) if i not in parents):
        path = [*prefix, *tree.path_tokens(leaf)]
        alone = plain.run([Part(0, TokenTree.chain(path))], other)
        for depth, node in enumerate(tree.path(leaf)):
            for i, name in enumerate(names):
                wanted = alone[i][length + depth]
                if not _near(got[i][node], wanted, lambda i=i, node=node: again()[i][node]):  # type: ignore[misc]
                    error = relative_error(got[i][node], wanted)
                    return f"{name} after {length + depth + 1} tokens differs by {error:.2e} of the largest"
    return None


def _near(got: Tensor, wanted: Tensor, again: Callable[[], Tensor]) -> bool:
    """Equal but for rounding, which is measured by `again`: what is wanted, in another order of sums."""
    got, wanted = got.nan_to_num(), wanted.nan_to_num()
    error, most = relative_error(got, wanted), tolerance(wanted.dtype)
    return error <= most or error <= most + DRAWS * min(relative_error(again().nan_to_num(), wanted), 10 * most)
