"""A graph in slabs: calls in a row, so cut that as many slabs as possible are the same function.

The layers of a decoder repeat, and a compiler's time grows with the calls that it is given: what is alike is compiled
once and called again with other weights. Cuts lie between attention sites, where the fewest values are alive: the
residual stream, and what all layers read. Two slabs are the same function where their calls, constants and wiring
are, and the sizes, strides and dtypes of what they read, dynamic sizes by symbol.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from ..ir.library import definition
from ..ir.private_torch import OpOverload
from ..ir.streaming import fetch, release

CALL = 0.35
"""What a call of a slab costs a step, in layers compiled once: some 15 us against 0.3 s."""
PIECE = 1
"""What each distinct slab costs beside its layers, each of which takes some 2 s: 1.6 s of them headers in C++."""
WORTH = 0.7
"""Of what a whole graph costs: where more is left it is not cut."""


@dataclass(frozen=True)
class Slab:
    """Calls in a row as a graph of their own."""

    graph: fx.Graph
    """Its placeholders stand for `outer`, its outputs are the values of `results`."""
    outer: tuple[fx.Node, ...]
    """Nodes of the whole graph that it reads."""
    results: tuple[fx.Node, ...]
    """Nodes of the whole graph that are read behind it."""
    structure: Hashable
    """Equal for equal calls, constants and wiring."""


def units(graph: fx.Graph) -> list[list[fx.Node]]:
    """The calls of a graph, cut once between each two of its sites; fewer than two lists: it cannot be cut."""
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "output") and not _is_size(n)]
    sites = [i for i, n in enumerate(calls) if isinstance(n.target, OpOverload) and n.target._schema.is_mutable]
    plain = all(n.op in ("placeholder", "output", "call_function") for n in graph.nodes)
    if len(sites) < 2 or not plain or not all(_movable(n) for n in graph.nodes if _is_size(n)):
        return []
    alive = _alive(graph, calls)
    # NOTE the first of several places: the same one in every layer
    cuts = [min(range(a + 1, b + 1), key=alive.__getitem__) for a, b in itertools.pairwise(sites)]
    return [calls[a:b] for a, b in zip([0, *cuts], [*cuts, len(calls)], strict=True)]


def streamed_units(graph: fx.Graph) -> list[list[fx.Node]]:
    """The calls of a graph that streams weights, cut at its fetches and releases, each of which is alone.

    A compiler must not see those: it would copy what an op writes whose arguments are a list, and a copy is not the
    slot. Fewer than two lists: it streams nothing.
    """
    found: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _is_size(node):
            continue
        if is_stream_call(node):
            found += [[node], []]
        else:
            found[-1].append(node)
    return [unit for unit in found if unit]


def is_stream_call(node: fx.Node) -> bool:
    """Whether it is a fetch or a release of streamed weights."""
    return definition(node.target) in (fetch, release)


def stream_call(part: Slab) -> fx.Node | None:
    """The fetch or release that a slab is; None: it is something else."""
    return next((n for n in part.graph.nodes if is_stream_call(n)), None)


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), (int, SymInt))


def _movable(size: fx.Node) -> bool:
    """Whether a size can be told anywhere: it is that of an input, or computed from such ones."""
    return all(n.op == "placeholder" or (_is_size(n) and _movable(n)) for n in size.all_input_nodes)


def _alive(graph: fx.Graph, calls: Sequence[fx.Node]) -> list[int]:
    """How many values are made before each call and read by it or behind it."""
    at = {node: i for i, node in enumerate(calls)} | {graph.output_node(): len(calls)}
    changes = [0] * (len(calls) + 2)
    for i, node in enumerate(calls):
        last = max((at[user] for user in node.users if user in at), default=i)
        changes[i + 1] += 1
        changes[last + 1] -= 1
    alive, now = [], 0
    for change in changes:
        alive.append(now := now + change)
    return alive


def slab(nodes: Sequence[fx.Node]) -> Slab:
    """These calls of a graph by themselves."""
    inside, graph = set(nodes), fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    outer: dict[fx.Node, fx.Node] = {}
    for node in _read_from_outside(nodes, inside):
        outer[node] = made[node] = graph.placeholder(f"outer_{len(outer)}")
    numbers = {node: i for i, node in enumerate(outer)}
    structure: list[Hashable] = []

    def place(node: fx.Node) -> fx.Node:
        if node not in made:  # a size
            add(node)
        return made[node]

    def add(node: fx.Node) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), place)
        made[node] = graph.create_node(node.op, node.target, args, kwargs)
        made[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        numbered = map_arg((node.args, node.kwargs), lambda n: _Number(numbers[n]))
        structure.append((node.target, _frozen(numbered)))
        numbers[node] = len(numbers)

    for node in nodes:
        add(node)
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    graph.output([made[n] for n in results])
    return Slab(graph, tuple(outer), tuple(results), (*structure, *(numbers[n] for n in results)))


def _read_from_outside(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> Iterator[fx.Node]:
    """Tensors, each once; those that sizes are of as well."""
    seen = set(inside)
    stack = [n for node in reversed(nodes) for n in reversed(node.all_input_nodes)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_size(node):
            stack += node.all_input_nodes
        else:
            yield node


@dataclass(frozen=True)
class _Number:
    """The i-th value of a slab."""

    index: int


def _frozen(value: Any) -> Hashable:
    """Hashable, equal for equal arguments: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(_frozen, value)
    if isinstance(value, dict):
        return "dict", *((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step)
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def kind(value: Any) -> Hashable | None:
    """Equal for fake tensors that the same code takes; None for what cannot cross a cut: other than a contiguous
    tensor whose sizes are numbers and single symbols.
    """
    if not isinstance(value, Tensor):
        return None
    sizes = [s.node.expr if isinstance(s, SymInt) else s for s in value.shape]
    if not all(isinstance(s, int) or s.is_Symbol for s in sizes):
        return None
    strides = tuple(str(s) for s in value.stride())
    return value.dtype, value.device, tuple(map(str, sizes)), strides


def groups(keys: Sequence[Hashable]) -> list[range]:
    """Which units are compiled together, given what each of them is: little to compile, and few calls a step."""
    best: tuple[float, list[range]] = ((len(keys) + PIECE) * WORTH, [range(len(keys))])
    for size in range(1, len(keys) // 2 + 1):
        for first in range(size + 1):
            cuts = sorted({0, *range(first, len(keys), size), len(keys)})
            found = [range(a, b) for a, b in itertools.pairwise(cuts)]
            distinct = {tuple(keys[i] for i in each) for each in found}
            cost = sum(map(len, distinct)) + PIECE * len(distinct) + CALL * len(found)
            if cost < best[0]:
                best = (cost, found)
    return best[1]


def slots(parts: Sequence[Slab], inputs: Sequence[fx.Node], kept: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Places for the values that cross cuts, after those of the inputs; a place is taken again when it is free."""
    last = {node: i for i, part in enumerate(parts) for node in part.outer} | dict.fromkeys(kept, len(parts))
    places = {node: i for i, node in enumerate(inputs)}
    given, free, size = set(inputs), list[int](), len(inputs)
    for i, part in enumerate(parts):
        # NOTE values end after the call that reads them last, so that its results may take their places
        free += [places[n] for n in part.outer if n not in given and last[n] == i]
        for node in part.results:
            if not free:
                free.append(size)
                size += 1
            places[node] = free.pop()
    return places


def flat(value: Any) -> list[fx.Node] | None:
    """The nodes of a graph's output; None where it gives anything else."""
    found: list[Any] = []
    map_aggregate(value, lambda leaf: found.append(leaf))
    return found if all(isinstance(leaf, fx.Node) for leaf in found) else None
