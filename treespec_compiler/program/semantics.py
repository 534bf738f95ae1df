"""Does the graph still mean what the model means? Oracles that can run after any pass.

The reference is the eager model itself, on each root path of a random tree.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call import CallSpec, run_logits
from ..capture.fills import as_it_was, refillable, unfilled
from ..capture.found import place
from ..errors import PassError, Refusal, TreespecError, Unsupported
from ..ir import ops
from ..ir.inputs import STREAM, TOKENS, is_pool, is_state
from ..ir.specs import EVERY_ROW, LogitsSpec
from ..ir.streaming import FromModel, entered
from ..ir.verify import LOGITS
from ..logs import logger
from ..passes.framework.manager import Check
from ..passes.framework.state import GraphState
from ..tree import TokenTree
from .batch import Batch, Part, pack
from .cache import TreeCache
from .links import Link
from .named_tokens import named_tokens
from .own_choices import own_choices
from .rounding import is_rounding, relative_error, tolerance
from .target import as_target

log = logger(__name__)

STATEFUL = ("stateful", "rows", "bound")
# Of a length that stands alone, besides the first one.
MOST_PROMPTS = 8

# Logits [S, V] of a chain of tokens.
Reference = Callable[[list[int]], Tensor]
# Whether logits [V] after these tokens differ from the expected ones by rounding alone.
Rounding = Callable[[list[int], Tensor, Tensor], bool]


def eager_logits(
    model: nn.Module,
    call: CallSpec,
    ids: list[int],
    device: torch.device,
    spec: LogitsSpec = EVERY_ROW,
    as_first: bool = True,
) -> Tensor:
    """Logits [S, V] of the model itself, called as it was captured; [1, V] where it gives those of the last token.

    Each run is a first one: it sees nothing of the others, and leaves the model's attributes as they were. Without
    `as_first` it sees what runs of before filled, which to look for takes another run.
    """
    with as_it_was(model), unfilled(refillable(model, call) if as_first else ()):
        return _run(model, call, ids, device, spec)


def _run(model: nn.Module, call: CallSpec, ids: list[int], device: torch.device, spec: LogitsSpec) -> Tensor:
    there = call.with_tokens(torch.tensor([ids], device=device))
    with torch.no_grad():
        return spec.rows(run_logits(model, there.args, there.kwargs))


def eager_rows(
    model: nn.Module,
    call: CallSpec,
    ids: list[int],
    wanted: Iterable[int],
    device: torch.device,
    spec: LogitsSpec,
    as_first: bool = True,
) -> dict[int, Tensor]:
    """The model's logits [V] after token i of `ids`, for each wanted i: one run, or one for each."""
    if spec.last:
        return {i: eager_logits(model, call, ids[: i + 1], device, spec, as_first)[-1] for i in wanted}
    rows = eager_logits(model, call, ids, device, spec, as_first)
    return {i: rows[i] for i in wanted}


@contextlib.contextmanager
def kept(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Runs of the model write copies of these buffers (its own K/V caches); the user's stay as they are."""
    held: list[tuple[Any, Any, Tensor]] = []
    for name in names:
        listed = place(name, model)
        if listed is not None:
            held.append((*listed, listed[0][listed[1]]))
            continue
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        table = module._buffers if key in module._buffers else vars(module)
        held.append((table, key, table[key]))  # type: ignore[arg-type]
    try:
        for table, key, tensor in held:
            table[key] = tensor.clone()
        yield
    finally:
        for table, key, tensor in held:
            table[key] = tensor


def run_graph(state: GraphState, tree: TokenTree, prefix: list[int]) -> Tensor:
    """Logits [N, V] of the state's graph for a tree after a committed prefix, op by op."""
    value = state.logits_value
    cache = TreeCache(state.sites, len(prefix) + len(tree), 1, value.device, ops.commit_path, states=state.states)
    cache._reserve(0, len(prefix) + len(tree))
    if prefix:
        chain = TokenTree.chain(prefix)
        _interpret(state, pack([Part(0, chain)], cache, value.device), cache)
        cache._append(0, prefix)
    return _interpret(state, pack([Part(0, tree)], cache, value.device), cache)


def _interpret(state: GraphState, batch: Batch, cache: TreeCache) -> Tensor:
    dynamic = batch.named()
    dynamic[state.tokens] = dynamic.pop(TOKENS)
    pools = iter(cache.pools)
    states = iter(cache.states.tensors if cache.states is not None else ())
    inputs: list[Any] = []
    stream: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if state.streaming is not None:
        layers = FromModel(state.streaming, state.weights.streamed_tensor)
        stream = entered(state.streaming.handle, layers)
        dynamic |= layers.places
    for node in state.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in dynamic:
            inputs.append(dynamic[node.name])
        elif is_pool(node.name):
            inputs.append(next(pools))
        elif is_state(node.name):
            inputs.append(next(states))
        elif node.name in state.weights:
            inputs.append(state.constants[node.name])
        elif node.name == STREAM.name and node.name in state.inputs:
            inputs.append(None)  # it comes when it is run
        else:
            rank: int = node.meta["val"].dim()
            inputs.append(batch.meta.positions.view([1] * (rank - 1) + [-1]))  # a positions argument of the model
    with torch.no_grad(), stream:
        link = Link.of(state) if state.whole is not None else None
        if link is None:
            return state.logits_given.rows(state.gm(*inputs)[0])
        return _through_stages(state, link, inputs, batch)


def _through_stages(state: GraphState, link: Link, inputs: list[Any], batch: Batch) -> Tensor:
    """Logits [rows, V] of the last stage, on every rank."""
    at = state.placeholders.index(STREAM.name) if STREAM.name in state.inputs else None

    def run(stream: Tensor | None) -> list[Tensor]:
        if at is not None:
            inputs[at] = stream
        (output,) = state.gm(*inputs)
        return [state.logits_given.rows(output) if state.outputs == [LOGITS] else output]

    outputs = link.run(batch.tokens.shape[1], run)
    return link.shared(outputs, len(batch.meta.rows))[0]


def seen_first(ids: list[int], hidden: Collection[int]) -> list[int]:
    """The text, which begins with none of these tokens."""
    first = next((t for t in itertools.count(ids[0]) if t not in hidden), 0) if hidden and ids else None
    return ids if first is None else [first, *ids[1:]]


def random_tree(size: int, vocab: int, seed: int) -> TokenTree:
    """A random tree of `size` nodes."""
    rng = random.Random(seed)
    return TokenTree(
        [rng.randrange(vocab) for _ in range(size)], [rng.randrange(-1, i) if i else -1 for i in range(size)]
    )


def semantic_check(model: nn.Module, call: CallSpec) -> Check:
    """The path oracle (chain oracle before state is inserted) as a check after each pass, against the model itself."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def check(state: GraphState, name: str) -> None:
        spec = state.model_logits
        compare = path_check(
            lambda ids: eager_logits(model, call, ids, device, spec),
            lambda ids, got, expected: is_rounding(model, call, ids, got, expected, spec),
        )
        with kept(model, state.caches), as_target(model, state), own_choices(state):
            compare(state, name)

    return check


def path_check(reference: Reference, rounding: Rounding = lambda ids, got, expected: False) -> Check:
    """Compares every node's logits in a random tree with the reference's on the node's path."""

    def check(state: GraphState, name: str) -> None:
        value = state.logits_value
        if any(t.is_meta for t in state.constants.values()):
            log.warning("weights on meta: the meaning of the graph after %s cannot be checked", name)
            return
        vocab = int(value.shape[state.logits_given.vocabulary])
        stateful = state.level in STATEFUL
        chain = seen_first([i % vocab for i in range(2, 11)], state.padding)
        tree = random_tree(9, vocab, 1) if stateful else TokenTree.chain(chain)
        prefix = seen_first([i % vocab for i in range(1, 8)] if stateful else [], state.padding)
        got = run_graph(state, tree, prefix)
        for node in range(len(tree) - len(got), len(tree)):  # the last one alone, where a model gives no more
            path = prefix + tree.path_tokens(node)
            expected, row = reference(path)[-1], got[node - len(tree)]
            error = relative_error(row, expected)
            if not error <= tolerance(value.dtype) and not rounding(path, row, expected):
                raise PassError(
                    pass_name=name,
                    problem=f"logits {error:.2e} away from the model's on the path {path}",
                    expected=f"at most {tolerance(value.dtype):.0e} of the largest logit, or the model's own rounding",
                )

    return check


def lengths_check(model: nn.Module, call: CallSpec, state: GraphState) -> None:
    """What the trace does not show, compared by running it: a prompt of one token, a second call, and any length that
    the guards single out.

    A forward pass that sets attributes may do something else when it is called again.
    """
    value = state.logits_value
    if any(t.is_meta for t in state.constants.values()):
        log.info("weights on meta: a branch on a single length cannot be looked for")
        return
    traced = call.length
    # What forward sets stays set for the runs that follow, the longest one first.
    known = _length_error(model, call, state, traced)  # which the trace shows: only roundings differ
    most = tolerance(value.dtype)
    if not known <= 10 * most:
        raise Unsupported(
            Refusal.BRANCH,
            f"the graph, as it was proved, gives other logits than the model for the same {traced} tokens: they differ "
            f"by {known:.2e} of the largest, so something that forward does is not in it",
            way_out="look for what depends on more than the token ids (surroundings, caches), for numbers that round "
            "away, and for scores so large that the numbers of a mask do not hide them",
        )
    allowed = min(max(3 * known, most), 10 * most)
    longest = min((limit.tokens for limit in state.limits), default=None)
    # a longer prompt than the program ever runs
    lengths = {n for n in (1, 2, *state.lone_lengths) if longest is None or n <= longest}
    for length in sorted(lengths, reverse=True):
        error = _lone_error(model, call, state, length, lone=length in state.lone_lengths)
        if error <= allowed:
            continue
        # The same prompt again: a table that is swapped in every call is right in every other one.
        again = max(_length_error(model, call, state, traced) for _ in range(2))
        if not again <= allowed:
            raise Unsupported(
                Refusal.STATE,
                f"a second call takes another branch: the logits of the same {traced} tokens then differ by "
                f"{again:.2e} of the largest from those of the first call",
                way_out="move counters and other state of Python out of forward",
            )
        many = "one token takes" if length == 1 else f"{length} tokens takes"
        raise Unsupported(
            Refusal.BRANCH,
            f"a prompt of {many} another branch: its logits differ by {error:.2e} of the largest from those of the "
            f"traced graph, where {traced} tokens differ by {known:.0e}, which is rounding",
            way_out="make the forward pass the same for every number of tokens",
        )


def _lone_error(model: nn.Module, call: CallSpec, state: GraphState, length: int, lone: bool) -> float:
    """As `_length_error`, where the model may not take so many tokens; of several prompts where the length is `lone`.

    A branch at one length may do nothing but for some token: those that the model names are all looked at.
    """
    vocab = int(state.logits_value.shape[-1])
    named = [token for token in named_tokens(model, vocab) if token not in state.padding] if lone else []
    parts = [named[i : i + length] for i in range(0, len(named), length)][:MOST_PROMPTS]
    try:
        errors = [_length_error(model, call, state, length, part) for part in ([], *parts)]
        return next((error for error in errors if error != error), max(errors))
    except TreespecError:
        raise
    except Exception as error:
        raise Unsupported(
            Refusal.RAISES,
            f"the model itself fails on a prompt of {length} tokens, which its code or its guards single out: "
            f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            way_out=f"make the forward pass take {length} tokens, or remove the branch on that number",
        ) from error


def _length_error(model: nn.Module, call: CallSpec, state: GraphState, length: int, first: Sequence[int] = ()) -> float:
    """How far the graph is from the model on a prompt of this many tokens, where the model says something itself.

    `first`: what the prompt begins with, where the model may begin with it.
    """
    value = state.logits_value
    given = [*first, *((7 * i + 1) % int(value.shape[-1]) for i in range(length))]
    ids = seen_first(given[:length], state.padding)
    with kept(model, state.caches), as_target(model, state), own_choices(state):
        expected = _run(model, call, ids, value.device, state.model_logits)
    numbers = ~expected.isnan().any(-1)
    if not numbers.any():
        return 0.0
    return relative_error(run_graph(state, TokenTree.chain(ids), [])[-len(expected) :][numbers], expected[numbers])
