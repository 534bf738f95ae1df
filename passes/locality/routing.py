"""Token locality of routing: rows sorted by expert, computed group by group, and sorted back.

What is proved, op by op (see `rows` for the values): a sort of one number per row is a permutation, known by its node;
indexing by a permutation, or by the tokens of its rows, moves rows; a grouped matmul whose group ends count the ids
that its rows are sorted by gives each row its own id's matrix; indexing by the inverse of the same permutation undoes
it, and adding rows up at their own tokens keeps tokens apart. Everything else between goes through the rules of
`token_rules`, with rows in the place of tokens. Counts of ids depend on every token and may only end groups: a capacity
derived from them, or positions within an expert, is refused. So does the place of a row in an order: it may only say
which rows to take, and is no number that anything is computed from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from ..forms.closed_form import shape_of
from .axes import Axis, Mixes, rank_of
from .channel_rules import CHANNELS
from .custom_ops import custom_rule
from .ids import id_bound, same_ids
from .rows import GroupSizes, Inverse, Place, Repeats, RowNumbers, Rows, Uniform, reshaped, rows_of, simplest
from .token_rules import RULES, AxisRule
from .token_writes import WRITES

aten = torch.ops.aten


@dataclass
class _View:
    """Rows in the place of tokens, for the rules that know of tokens only."""

    length: sympy.Expr
    axes: dict[fx.Node, Axis]


class Routing:
    """Places of nodes, given the places of their operands."""

    def __init__(self, places: dict[fx.Node, Place], length: sympy.Expr) -> None:
        self.places = places
        self.length = length
        self.numbers: dict[fx.Node, RowNumbers] = {}
        self.inverses: dict[fx.Node, Inverse] = {}
        self.counted: set[fx.Node] = set()
        """Every tensor whose values are places of rows, whether it is known which or not."""

    def knows(self, node: fx.Node) -> bool:
        return op_name(node) in _ROUTES or _rule(node) is not None

    def place(self, node: fx.Node) -> Place:
        """The place of `node`; raises `Mixes` when it is not proved to keep tokens apart."""
        self._refuse_places_as_values(node)
        route = _ROUTES.get(op_name(node))
        place = route(self, node) if route is not None else NotImplemented
        if place is NotImplemented:
            if op_name(node) in _INDEX_ARGUMENTS:
                self._refuse_places_as_values(node, index=True)
            place = self._row_by_row(node)
        counts = node in self.numbers or node in self.inverses
        if counts or (op_name(node) in _STILL_PLACES and any(a in self.counted for a in node.all_input_nodes)):
            self.counted.add(node)
        return place

    def _refuse_places_as_values(self, node: fx.Node, index: bool = False) -> None:
        """The place of a row among all of them depends on every token: it may index rows, and nothing else.

        `index`: not even that, as where a table that holds no rows is read.
        """
        at = -1 if index else _INDEX_ARGUMENTS.get(op_name(node), -1)
        values = [a for i, x in enumerate(node.args) if i != at for a in _nodes(x)]
        values += _nodes(list(node.kwargs.values()))
        used = next((a for a in values if a in self.counted), None)
        value = node.meta["val"]
        integers = isinstance(value, torch.Tensor) and value.dtype in _PLACE_TYPES
        moved = op_name(node) in _STILL_PLACES and used is node.args[0] and integers
        if used is not None and not moved:
            raise Mixes(f"it computes with the places of tokens in an order ({used.name}), which depend on every token")

    def _row_by_row(self, node: fx.Node) -> Place:
        """An op that acts on each token alone, applied to rows."""
        operands = [a for a in node.all_input_nodes if a in self.places]
        for operand in operands:
            if isinstance(self.places[operand], GroupSizes):
                raise Mixes(f"it reads how many rows each expert got ({operand.name}), which depends on every token")
        held = {a: rows for a in operands if (rows := rows_of(self.places[a])) is not None}
        kinds = {(rows.repeats, rows.order) for rows in held.values()}
        if len(kinds) != 1:
            names = "; ".join(sorted({f"{a.name}: {rows}" for a, rows in held.items()}))
            raise Mixes(f"its operands hold rows in different orders ({names})")
        repeats, order = kinds.pop()
        axes: dict[fx.Node, Axis] = {}
        for operand in operands:
            place = self.places[operand]
            axes[operand] = place.at if isinstance(place, (Rows, Uniform)) else place  # type: ignore[assignment]
        rule = _rule(node)
        if rule is None:
            raise Mixes("it is known as a part of routing only, and here it is none")
        at = rule(node, _View(repeats.size(self.length), axes))
        self._follow_numbers(node)
        return None if at is None else simplest(Rows(at, repeats, order))

    def _follow_numbers(self, node: fx.Node) -> None:
        """Casts and added dimensions of size 1 keep what row numbers mean."""
        if op_name(node) not in ("aten._to_copy", "aten.unsqueeze", "aten.squeeze", "aten.expand"):
            return
        source: Any = node.args[0]
        if node.meta["val"].dtype not in (torch.int32, torch.int64):
            return
        if source in self.numbers:
            self.numbers[node] = self.numbers[source]
        if source in self.inverses:
            self.inverses[node] = self.inverses[source]


def _rule(node: fx.Node) -> AxisRule | None:
    """The rule of an op that acts on each token alone."""
    name = op_name(node)
    return RULES.get(name) or WRITES.get(name) or CHANNELS.get(name) or custom_rule(name)


# Which argument takes places of rows.
_INDEX_ARGUMENTS = {
    "aten.index": 1,
    "aten.index_select": 2,
    "aten.index_put": 1,
    "aten.index_add": 2,
    "aten.sort": 0,
    "aten.argsort": 0,
    "aten.floor_divide": 0,
    "aten.div": 0,
    "aten.remainder": 0,
}
# What gives places of rows again; copies and divisions by k are followed where it is known of which.
_STILL_PLACES = (
    "aten._to_copy", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.reshape", "aten.flatten", "aten.unflatten",
    "aten.repeat", "aten.repeat_interleave", "aten.sort", "getitem",
)  # fmt: skip
_PLACE_TYPES = (torch.int32, torch.int64)


def _nodes(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    return [n for x in value for n in _nodes(x)] if isinstance(value, (list, tuple)) else []


_COUNTS = (torch.int32, torch.int64, torch.float32, torch.float64)


def _reshape(self: Routing, node: fx.Node) -> Place:
    rows = rows_of(self.places[node.args[0]])
    if rows is None:
        return NotImplemented
    return simplest(reshaped(rows, shape_of(node.args[0]), shape_of(node), self.length))


def _repeat_interleave(self: Routing, node: fx.Node) -> Place:
    """Each row k times, one copy after the other."""
    rows, times = rows_of(self.places[node.args[0]]), node.args[1]
    dim = argument(node, "dim")
    if rows is None or dim is None or int(dim) % rank_of(node) != rows.at or rows.order is not None:
        return NotImplemented
    if not isinstance(times, int):
        raise Mixes("it repeats each token a number of times that is computed")
    return simplest(Rows(rows.at, Repeats(rows.repeats.outer, rows.repeats.inner * times)))


def _repeat(self: Routing, node: fx.Node) -> Place:
    """The whole sequence of rows k times."""
    rows = rows_of(self.places[node.args[0]])
    at = rows.at + rank_of(node) - rank_of(node.args[0]) if rows is not None else 0
    if rows is None or rows.order is not None or not isinstance(times := node.args[1][at], int):
        return NotImplemented
    return simplest(Rows(at, Repeats(rows.repeats.outer * times, rows.repeats.inner)))


def sort_call(node: fx.Node) -> tuple[int, bool]:
    """(dimension, descending) of a sort or argsort."""
    dim = int(argument(node, "dim")) % max(rank_of(node.args[0]), 1)
    return dim, bool(argument(node, "descending"))


def _sort(self: Routing, node: fx.Node) -> Place:
    source: Any = node.args[0]
    rows = rows_of(self.places[source])
    dim, descending = sort_call(node)
    if rows is None or rows.at != dim:
        return NotImplemented
    if rank_of(source) != 1:
        raise Mixes("it sorts the tokens in every column on its own")
    argsort = op_name(node) == "aten.argsort"
    numbers = self.numbers.get(source)
    if argsort and not descending and numbers is not None and numbers.exact and rows.order is not None:
        # NOTE sorting a permutation: its values are 0, 1, 2, ..., so the places they came from are its inverse.
        self.inverses[node] = Inverse(rows.order)
        return simplest(Rows(0, rows.repeats))
    if rows.order is not None:
        raise Mixes(f"it sorts rows that are already in the order of {rows.order.name}")
    self._refuse_places_as_values(node, index=True)
    if argsort:
        self.numbers[node] = RowNumbers(rows.repeats, exact=True)
    return Rows(0, rows.repeats, node)


def _getitem(self: Routing, node: fx.Node) -> Place:
    source: Any = node.args[0]
    place = self.places[source]
    if isinstance(place, Rows) and place.order is source and node.args[1] == 1:
        self.numbers[node] = RowNumbers(place.repeats, exact=True)
    return place if isinstance(place, Rows) else NotImplemented


def _divide(self: Routing, node: fx.Node) -> Place:
    """Row number // k: the number of the row it was copied from, of the same token."""
    numbers = self.numbers.get(node.args[0])
    whole = op_name(node) == "aten.floor_divide" or argument(node, "rounding_mode") in ("floor", "trunc")
    by = node.args[1]
    if numbers is not None and whole and isinstance(by, int) and by > 0 and numbers.repeats.inner % by == 0:
        divided = Repeats(numbers.repeats.outer, numbers.repeats.inner // by)
        self.numbers[node] = RowNumbers(divided, exact=by == 1 and numbers.exact)
        return self.places[node.args[0]]
    return NotImplemented


def _remainder(self: Routing, node: fx.Node) -> Place:
    """Row number % k: which of its token's k copies a row is. Another remainder tells of the other tokens."""
    numbers, by = self.numbers.get(node.args[0]), node.args[1]
    if numbers is not None and isinstance(by, int) and by > 0 and numbers.repeats.inner % by == 0:
        return self.places[node.args[0]]
    return NotImplemented


def _taken(self: Routing, source: fx.Node, dim: int, index: fx.Node) -> Place:
    """Rows picked along `dim` by a tensor of row numbers."""
    rows = rows_of(self.places[source])
    if rows is None or rows.at != dim or rank_of(index) != 1:
        return NotImplemented
    inverse, numbers = self.inverses.get(index), self.numbers.get(index)
    if inverse is not None:
        if rows.order is not inverse.order:
            wanted = inverse.order.name
            raise Mixes(f"it undoes the order of {wanted}, but its rows are {rows}")
        return simplest(Rows(dim, rows.repeats))
    if numbers is None:
        return NotImplemented
    if rows.order is not None or rows.repeats != numbers.repeats:
        raise Mixes(f"it picks rows by numbers that count other rows than these ({rows})")
    return simplest(rows_of(self.places[index]).moved(dim))  # type: ignore[union-attr]


def _index(self: Routing, node: fx.Node) -> Place:
    used = [i for i, x in enumerate(node.args[1]) if x is not None]
    return _taken(self, node.args[0], used[0], node.args[1][used[0]]) if len(used) == 1 else NotImplemented


def _index_select(self: Routing, node: fx.Node) -> Place:
    source: Any = node.args[0]
    return _taken(self, source, int(node.args[1]) % rank_of(source), node.args[2])


def _index_put(self: Routing, node: fx.Node) -> Place:
    """out[permutation] = rows: every row goes back to its own place."""
    target, indices, values = node.args[:3]
    index = indices[0] if len(indices) == 1 else None
    numbers, moved = self.numbers.get(index), rows_of(self.places.get(values))
    if numbers is None:
        raise Mixes("it writes rows to places that are not a known permutation of them")
    if argument(node, "accumulate", False):
        return _added(self, node, target, 0, index, values)
    if not numbers.exact or moved is None or moved != rows_of(self.places[index]).moved(moved.at) or moved.at != 0:  # type: ignore[union-attr]
        raise Mixes("it writes rows to places that are not a known permutation of them")
    return simplest(Rows(0, numbers.repeats))


def _index_add(self: Routing, node: fx.Node) -> Place:
    target, dim, index, values = node.args[:4]
    return _added(self, node, target, int(dim) % rank_of(target), index, values)


def _added(self: Routing, node: fx.Node, target: Any, dim: int, index: Any, values: Any) -> Place:
    """out[row numbers] += rows, each at a row of its own token."""
    numbers, base, moved = self.numbers.get(index), self.places[target], rows_of(self.places[values])
    by = rows_of(self.places[index])
    if numbers is None or moved is None or by is None or rank_of(index) != 1:
        raise Mixes("it adds rows up at places that are not known to belong to the same token")
    if moved != by.moved(dim):
        raise Mixes(f"it adds up rows that are {moved} at places of rows that are {by}")
    same = isinstance(base, Uniform) and shape_of(target)[dim] == numbers.repeats.size(self.length)
    if not same and rows_of(base) != Rows(dim, numbers.repeats):
        raise Mixes("it adds rows up in a tensor that does not hold the rows of their tokens")
    return simplest(Rows(dim, numbers.repeats))


def _histc(self: Routing, node: fx.Node) -> Place:
    """Counts of each id, when every id has a bin of its own."""
    source: Any = node.args[0]
    groups = int(argument(node, "bins", 100))
    low, high = argument(node, "min", 0), argument(node, "max", 0)
    bound = id_bound(source)
    if bound is None or bound > groups or rank_of(source) != 1:
        raise Mixes("it counts a value over all tokens")
    lost = _id_without_bin(bound, groups, low, high)
    if lost is not None:
        raise Mixes(f"it counts over all tokens, and id {lost} has no bin of its own")
    return GroupSizes("counts", same_ids(source), groups)


@functools.cache
def _id_without_bin(bound: int, groups: int, low: float, high: float) -> int | None:
    """The first id whose bin is not its own number, found by counting each id alone."""
    for i in range(bound):
        bins = torch.histc(torch.tensor([float(i)]), groups, low, high)
        if bins[i] != 1 or bins.sum() != 1:
            return i
    return None


def _cumsum(self: Routing, node: fx.Node) -> Place:
    place = self.places[node.args[0]]
    if not isinstance(place, GroupSizes):
        return NotImplemented
    if place.kind != "counts" or node.meta["val"].dtype not in _COUNTS:
        raise Mixes("it sums up group sizes that are no counts, or in a type that cannot hold them")
    return GroupSizes("ends", place.ids, place.groups)


def _cast(self: Routing, node: fx.Node) -> Place:
    place, value = self.places[node.args[0]], node.meta["val"]
    if not isinstance(place, GroupSizes):
        return NotImplemented
    if value.dtype not in _COUNTS:
        raise Mixes(f"it rounds counts of tokens to {value.dtype}")
    return place


def _grouped_matmul(self: Routing, node: fx.Node) -> Place:
    """Rows sorted by id, times the matrix of each row's id."""
    rows_node, weight, ends_node = node.args[0], node.args[1], argument(node, "offs", argument(node, "ends"))
    rows, ends = rows_of(self.places[rows_node]), self.places.get(ends_node)
    shapes, more = (rank_of(rows_node), rank_of(weight)), [a for a in node.args[3:] if isinstance(a, fx.Node)]
    if rows is None or rows.at != 0 or shapes != (2, 3) or self.places[weight] is not None or more:
        raise Mixes("its rows or its matrices are not where a grouped matmul has them")
    if not isinstance(ends, GroupSizes) or ends.kind != "ends":
        raise Mixes("its groups do not end where the counts of the rows' ids say")
    if rows.order is None:
        raise Mixes("its rows are not sorted")
    key, (_, descending) = rows.order.args[0], sort_call(rows.order)
    bound = id_bound(key)
    if descending or bound is None or same_ids(key) is not ends.ids:
        raise Mixes(f"its groups count {ends.ids.name}, but its rows are sorted by {key.name}")
    if shape_of(weight)[0] != ends.groups or bound > ends.groups:
        raise Mixes(f"it has {shape_of(weight)[0]} matrices for {ends.groups} groups")
    return rows


_Route = Callable[[Routing, fx.Node], Any]

_ROUTES: dict[str, _Route] = {
    "aten.reshape": _reshape,
    "aten.flatten": _reshape,
    "aten.unflatten": _reshape,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.repeat": _repeat,
    "aten.sort": _sort,
    "aten.argsort": _sort,
    "getitem": _getitem,
    "aten.floor_divide": _divide,
    "aten.div": _divide,
    "aten.remainder": _remainder,
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.index_put": _index_put,
    "aten.index_add": _index_add,
    "aten.histc": _histc,
    "aten.cumsum": _cumsum,
    "aten._to_copy": _cast,
    "transformers.grouped_mm_fallback": _grouped_matmul,
    "aten._grouped_mm": _grouped_matmul,
    "treespec.grouped_linear": _grouped_matmul,
}
