"""Rules of ops that move numbers and change none: a cut goes where its numbers go, a partial sum stays one."""

from __future__ import annotations

from typing import Any

import sympy

from ...forms.form import Shape
from ..placements import PARTIAL, REPLICATED, Partial, Placement, Segment, Sharded, between, offsets, sharded
from ..rule import Fit, Given, Op, PlacementRule, Want, named


def _one(op: Op, given: Given, gives: Placement | None) -> Fit | None:
    """An op of one cut operand, the first; nothing else is cut."""
    if gives is None:
        return None
    return Fit((given[0], *[REPLICATED] * (len(op.operands) - 1)), gives)


def _want(cut: Sharded | None, start: int = 0) -> list[Want] | None:
    return None if cut is None else [Want(0, cut, start)]


# -- reshape ------------------------------------------------------------------------------------------------------


def reshaped(cut: Sharded, before: Shape, after: Shape, ranks: int) -> Sharded | None:
    """The cut of `before` as one of `after`, which holds the same numbers in another shape; None: it is none."""
    group = _group(cut.dim, before, after)
    if group is None:
        return None
    (low, high), (first, last) = group
    outer, inner = _product(before[low : cut.dim]), _product(before[cut.dim + 1 : high])
    if not (isinstance(outer, int) and isinstance(inner, int)):
        return None
    if outer > 1 and len(cut.segments) > 1:
        return None
    flat = [s.scaled(inner) for s in cut.segments] * outer
    uniform = all(s == flat[0] for s in flat)
    for dim in range(first, last):
        front, back = _product(after[first:dim]), _product(after[dim + 1 : last])
        if not isinstance(front, int) or not isinstance(back, int):
            continue
        if front == 1:
            found = flat
        elif front == len(flat) and uniform:  # q, k and v side by side become a dimension of their own
            found = flat[:1]
        else:
            continue
        if all(s.size % back == 0 for s in found):
            made = Sharded(dim, tuple(Segment(s.size // back, s.repeat) for s in found), cut.unit)
            if made.fits(ranks):
                return made
    return None


def _group(dim: int, before: Shape, after: Shape) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The shortest runs of dimensions around `dim` and in `after` that hold the same numbers."""
    heads = [_product(before[:i]) for i in range(len(before) + 1)]
    tails = [_product(after[:j]) for j in range(len(after) + 1)]
    pairs = [(i, j) for i, x in enumerate(heads) for j, y in enumerate(tails) if sympy.sympify(x - y) == 0]
    starts = [p for p in pairs if p[0] <= dim]
    if not starts:
        return None
    low, first = max(starts)
    ends = [p for p in pairs if p[0] > dim and p[1] > first]
    if not ends:
        return None
    high, last = min(ends)
    return (low, high), (first, last)


def _product(sizes: Any) -> Any:
    total = sympy.Integer(1)
    for size in sizes:
        total = total * size
    return int(total) if total.is_Integer else total


def _fits_reshape(op: Op, given: Given) -> Fit | None:
    cut = given[0]
    if not isinstance(cut, Sharded):
        return _one(op, given, cut)
    return _one(op, given, reshaped(cut, op.shapes[0], op.shape, op.ranks))


def _wants_reshape(op: Op, cut: Sharded) -> list[Want] | None:
    return _want(reshaped(cut, op.shape, op.shapes[0], op.ranks))


def _sizes(name: str) -> Any:
    """Sizes that an argument lists: that of the cut dimension is a rank's."""

    def numbers(op: Op, outcome: Fit) -> dict[str, Any]:
        cut = outcome.gives
        if not isinstance(cut, Sharded):
            return {}
        sizes = list(op.argument(name))
        if sizes[cut.dim] != -1:
            sizes[cut.dim] = cut.local(op.ranks)
        return {name: sizes}

    return numbers


# -- dimensions that change places -------------------------------------------------------------------------------


def _places(op: Op) -> list[int]:
    """Where each dimension of the result was."""
    rank = len(op.shapes[0])
    name = op.node.target.overloadpacket.__name__
    if name == "permute":
        return [int(d) % rank for d in op.argument("dims")]
    places = list(range(rank))
    one, two = (0, 1) if name == "t" else (op.argument("dim0") % rank, op.argument("dim1") % rank)
    if rank > 1:
        places[one], places[two] = places[two], places[one]
    return places


def _fits_permute(op: Op, given: Given) -> Fit | None:
    cut = given[0]
    return _one(op, given, cut.moved(_places(op).index(cut.dim)) if isinstance(cut, Sharded) else cut)


def _wants_permute(op: Op, cut: Sharded) -> list[Want] | None:
    return _want(cut.moved(_places(op)[cut.dim]))


def _kept(op: Op) -> list[int | None]:
    """For each dimension of the result, which one of the operand it is; None: a new one."""
    rank, name = len(op.shapes[0]), op.node.target.overloadpacket.__name__
    if name == "unsqueeze":
        kept: list[int | None] = [*range(rank)]
        kept.insert(op.argument("dim") % (rank + 1), None)
        return kept
    if name == "expand":
        return [None] * (len(op.shape) - rank) + [*range(rank)]
    if name == "select":
        gone = {op.argument("dim") % rank}
    else:  # squeeze
        dims = op.argument("dim") if "dim" in op.node.target._schema.__str__() else [*range(rank)]
        dims = [dims] if isinstance(dims, int) else dims
        gone = {d % rank for d in dims if op.shapes[0][d % rank] == 1}
    return [i for i in range(rank) if i not in gone]


def _fits_kept(op: Op, given: Given) -> Fit | None:
    cut, kept = given[0], _kept(op)
    if not isinstance(cut, Sharded):
        return _one(op, given, cut)
    return _one(op, given, cut.moved(kept.index(cut.dim)) if cut.dim in kept else None)


def _wants_kept(op: Op, cut: Sharded) -> list[Want] | None:
    dim = _kept(op)[cut.dim]
    if dim is None or (op.shapes[0][dim] == 1 and cut.size != 1):
        return [] if op.node.target.overloadpacket.__name__ == "expand" else None
    return _want(cut.moved(dim))


# -- parts of a dimension ------------------------------------------------------------------------------------------


def _range(op: Op) -> tuple[int, int, int] | None:
    """(dim, start, stop) of a slice, where the size is a number."""
    dim = op.argument("dim") % len(op.shapes[0])
    if not op.shapes[0][dim].is_Integer:
        return None
    size = int(op.shapes[0][dim])
    start, stop = op.argument("start") or 0, op.argument("end")
    if not isinstance(start, int) or not isinstance(stop, (int, type(None))):
        return None
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = size if stop is None else max(stop + size, 0) if stop < 0 else min(stop, size)
    return dim, start, stop


def _fits_slice(op: Op, given: Given) -> Fit | None:
    cut = given[0]
    if not isinstance(cut, Sharded) or cut.dim != op.argument("dim") % len(op.shapes[0]):
        return _one(op, given, cut)
    return _one(op, given, _sliced(op, cut))


def _sliced(op: Op, cut: Sharded) -> Placement | None:
    there = _range(op)
    if there is None:
        return None
    _, start, stop = there
    step = op.argument("step")
    if step != 1:
        return _every(op, cut, start, stop, step)
    if op.local:  # ends were taken for those of the whole: one past the part is the part's end
        start, stop = (min(x, cut.local(op.ranks)) for x in (start, stop))
    found = between(cut, start, stop, op.ranks, op.local)
    return None if found is None else sharded(cut.dim, found, op.ranks, cut.unit)


def _every(op: Op, cut: Sharded, start: int, stop: int, step: int) -> Placement | None:
    """Every `step`-th number of the dimension, such as the gates among gates and ups in turn."""
    size = cut.local(op.ranks) if op.local else cut.size
    even = all(s.local(op.ranks) % step == 0 for s in cut.segments)
    if start >= step or min(stop, size) < size or not even:
        return None
    return sharded(cut.dim, [Segment(s.size // step, s.repeat) for s in cut.segments], op.ranks, cut.unit)


def _wants_slice(op: Op, cut: Sharded) -> list[Want] | None:
    if cut.dim != op.argument("dim") % len(op.shapes[0]):
        return _want(cut)
    there, step = _range(op), op.argument("step")
    if there is None or step == 1:
        return None if there is None else _want(cut, there[1])
    if there[1] >= step or there[2] < op.shapes[0][there[0]]:
        return None
    return _want(Sharded(cut.dim, tuple(s.scaled(step) for s in cut.segments), cut.unit))


def _numbers_slice(op: Op, outcome: Fit) -> dict[str, Any]:
    cut, there = outcome.needs[0], _range(op)
    if not isinstance(cut, Sharded) or there is None or cut.dim != there[0]:
        return {}
    whole, part = offsets(cut.segments, op.ranks, False), offsets(cut.segments, op.ranks, True)
    if op.argument("step") != 1:
        return {"end": part[-1]}
    return {"start": part[whole.index(there[1])], "end": part[whole.index(there[2])]}


def _ends(op: Op) -> tuple[int, list[int]] | None:
    """(dim, ends of the pieces) of a split, as its arguments say it: of the whole, or of a part."""
    dim = op.argument("dim") % len(op.shapes[0])
    values = op.node.meta["val"]
    sizes = [v.shape[dim] for v in values]
    if not all(isinstance(s, int) for s in sizes):
        return None
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return dim, ends


def _fits_split(op: Op, given: Given) -> Fit | None:
    cut, count = given[0], len(op.node.meta["val"])
    dim = op.argument("dim") % len(op.shapes[0])
    needs = (cut, *[REPLICATED] * (len(op.operands) - 1))
    if not isinstance(cut, Sharded) or cut.dim != dim:
        return Fit(needs, (cut,) * count)
    there = _ends(op)
    if there is None:
        return None
    gives: list[Placement] = []
    for start, stop in zip(there[1], there[1][1:], strict=False):
        found = between(cut, start, stop, op.ranks, op.local)
        if found is None:
            return None
        gives.append(sharded(dim, found, op.ranks, cut.unit))
    even = isinstance(named(op.node).get("split_size"), int)  # one number for all pieces
    if even and len({sum(s.local(op.ranks) for s in getattr(g, "segments", ())) for g in gives}) > 1:
        return None
    return Fit(needs, tuple(gives))


def _numbers_split(op: Op, outcome: Fit) -> dict[str, Any]:
    cut, there = outcome.needs[0], _ends(op)
    if not isinstance(cut, Sharded) or there is None or cut.dim != there[0]:
        return {}
    whole, part = offsets(cut.segments, op.ranks, False), offsets(cut.segments, op.ranks, True)
    sizes = [
        part[whole.index(stop)] - part[whole.index(start)] for start, stop in zip(there[1], there[1][1:], strict=False)
    ]
    if "split_size" not in named(op.node):
        return {"split_sizes": sizes}
    return {"split_size": sizes[0] if isinstance(op.argument("split_size"), int) else sizes}


# -- several operands ----------------------------------------------------------------------------------------------


def _fits_cat(op: Op, given: Given) -> Fit | None:
    dim = op.argument("dim") % len(op.shapes[0])
    if any(isinstance(g, Partial) for g in given):
        return Fit((PARTIAL,) * len(given), PARTIAL) if set(given) == {PARTIAL} else None
    cut = next((g for g in given if isinstance(g, Sharded)), None)
    if cut is None:
        return None
    if cut.dim != dim:
        return Fit((cut,) * len(given), cut)
    segments: list[Segment] = []
    for one, shape in zip(given, op.shapes, strict=True):
        if isinstance(one, Sharded) and one.dim == dim:
            segments += one.segments
        else:
            segments.append(Segment(int(shape[dim]), op.ranks))
    needs = tuple(g if isinstance(g, Sharded) and g.dim == dim else REPLICATED for g in given)
    return Fit(needs, sharded(dim, segments, op.ranks, cut.unit))


def _wants_cat(op: Op, cut: Sharded) -> list[Want] | None:
    dim = op.argument("dim") % len(op.shapes[0])
    if cut.dim != dim:
        return [Want(i, cut) for i in range(len(op.operands))]
    found, start = [], 0
    for i, shape in enumerate(op.shapes):
        stop = start + int(shape[dim])
        segments = between(cut, start, stop, op.ranks, False)
        if segments is None:
            return None
        if any(s.repeat != op.ranks for s in segments):
            found.append(Want(i, Sharded(dim, segments, cut.unit)))
        start = stop
    return found


def _fits_stack(op: Op, given: Given) -> Fit | None:
    cut = next((g for g in given if isinstance(g, Sharded)), None)
    if cut is None:
        return Fit((PARTIAL,) * len(given), PARTIAL) if set(given) == {PARTIAL} else None
    at = op.argument("dim") % len(op.shape)
    return Fit((cut,) * len(given), cut.moved(cut.dim + (cut.dim >= at)))


def _wants_stack(op: Op, cut: Sharded) -> list[Want] | None:
    at = op.argument("dim") % len(op.shape)
    if cut.dim == at:
        return None
    return [Want(i, cut.moved(cut.dim - (cut.dim > at))) for i in range(len(op.operands))]


def _fits_index_select(op: Op, given: Given) -> Fit | None:
    """Rows by number. A cut of the numbers is a cut of the rows: so a rank takes its part of a replicated value."""
    x, index, dim = given[0], given[1], op.argument("dim") % len(op.shapes[0])
    if isinstance(index, Sharded):
        return Fit((REPLICATED, index), index.moved(dim))
    if isinstance(x, Sharded) and x.dim == dim:
        return None
    return Fit((x, REPLICATED), x)


def _wants_rows(op: Op, cut: Sharded) -> list[Want] | None:
    return None if cut.dim == op.argument("dim") % len(op.shapes[0]) else _want(cut)


def _fits_index(op: Op, given: Given) -> Fit | None:
    """x[i, j, ..] by tensors at the first dimensions: the others stay what they are."""
    x, indices = given[0], op.argument("indices")
    if any(i is None for i in indices) or any(g != REPLICATED for g in given[1:]):
        return None
    if isinstance(x, Partial):
        return Fit(tuple(given), x)
    if not isinstance(x, Sharded) or x.dim < len(indices):
        return None
    width = len(op.shape) - (len(op.shapes[0]) - len(indices))
    return Fit(tuple(given), x.moved(x.dim - len(indices) + width))


def _wants_index(op: Op, cut: Sharded) -> list[Want] | None:
    indices = op.argument("indices")
    width = len(op.shape) - (len(op.shapes[0]) - len(indices))
    if any(i is None for i in indices) or cut.dim < width:
        return None
    return _want(cut.moved(cut.dim - width + len(indices)))


def _fits_unbind(op: Op, given: Given) -> Fit | None:
    cut, count = given[0], len(op.node.meta["val"])
    dim = op.argument("dim") % len(op.shapes[0])
    if not isinstance(cut, Sharded):
        return Fit((cut,), (cut,) * count)
    if cut.dim == dim:
        return None
    return Fit((cut,), (cut.moved(cut.dim - (cut.dim > dim)),) * count)


RESHAPE = PlacementRule(_fits_reshape, _wants_reshape, _sizes("shape"))
PERMUTE = PlacementRule(_fits_permute, _wants_permute)
KEPT = PlacementRule(_fits_kept, _wants_kept)
SPLIT = PlacementRule(_fits_split, numbers=_numbers_split)

RULES = {
    "aten.reshape": RESHAPE,
    "aten.flatten": PlacementRule(_fits_reshape, _wants_reshape),
    "aten.transpose": PERMUTE,
    "aten.permute": PERMUTE,
    "aten.t": PERMUTE,
    "aten.unsqueeze": KEPT,
    "aten.squeeze": KEPT,
    "aten.select": KEPT,
    "aten.expand": PlacementRule(_fits_kept, _wants_kept, _sizes("size")),
    "aten.slice": PlacementRule(_fits_slice, _wants_slice, _numbers_slice),
    "aten.split": SPLIT,
    "aten.split_with_sizes": SPLIT,
    "aten.unbind": PlacementRule(_fits_unbind),
    "aten.cat": PlacementRule(_fits_cat, _wants_cat),
    "aten.stack": PlacementRule(_fits_stack, _wants_stack),
    "aten.index_select": PlacementRule(_fits_index_select, _wants_rows),
    "aten.index": PlacementRule(_fits_index, _wants_index),
}
