"""Weight expressions and placements: a rank's part of an expression, and the placement that an expression says."""

from __future__ import annotations

from dataclasses import replace

from treespec_compiler.errors import PassError
from treespec_compiler.ir.stored_weights import Pack
from treespec_compiler.ir.weights import Expression, Join, Lone, Shard, Slice, Transpose

from .placements import PARTIAL, REPLICATED, Partial, Placement, Segment, Sharded, offsets, sharded


def placed(of: Expression, placement: Placement, rank: int, ranks: int) -> Expression:
    """What `rank` holds of a whole weight under a placement."""
    if isinstance(placement, Partial):
        return Lone(of, rank == 0)
    if not isinstance(placement, Sharded):
        return of
    bounds = offsets(placement.segments, ranks, False)
    pieces = []
    for segment, start in zip(placement.segments, bounds, strict=False):
        piece: Expression = of
        if len(placement.segments) > 1:
            piece = Slice(of, placement.dim, start, start + segment.size)
        count = ranks // segment.repeat
        pieces.append(piece if count == 1 else Shard(piece, placement.dim, rank // segment.repeat, count))
    return Join(tuple(pieces), placement.dim) if len(pieces) > 1 else pieces[0]


def placement_of(made: Expression, ranks: int) -> Placement:
    """What an expression holds of the whole, told by the expression alone. Raises `PassError` where it says none."""
    if isinstance(made, Lone):
        return PARTIAL
    if isinstance(made, Shard):
        if placement_of(made.of, ranks) != REPLICATED or ranks % made.count:
            raise _no_placement(made)
        return Sharded(made.dim, (Segment(made.of.shape[made.dim], ranks // made.count),))
    parts = [placement_of(part, ranks) for part in made.parts]
    if all(part == REPLICATED for part in parts):
        return REPLICATED
    if isinstance(made, Pack):  # of the matrix that it packs
        return parts[0]
    if isinstance(made, Transpose) and isinstance(parts[0], Sharded):
        return parts[0].moved(1 - parts[0].dim)
    if isinstance(made, Join):
        return _joined(made, parts, ranks)
    raise _no_placement(made)


def _joined(made: Join, parts: list[Placement], ranks: int) -> Placement:
    if all(part == parts[0] for part in parts) and (parts[0] == PARTIAL or getattr(parts[0], "dim", None) != made.dim):
        return parts[0]
    segments: list[Segment] = []
    for piece, part in zip(made.pieces, parts, strict=True):
        if isinstance(part, Sharded) and part.dim == made.dim:
            segments += part.segments
        elif part == REPLICATED:
            segments.append(Segment(piece.shape[made.dim], ranks))
        else:
            raise _no_placement(made)
    return sharded(made.dim, segments, ranks)


def _no_placement(made: Expression) -> PassError:
    return PassError(pass_name="shard", problem=f"a weight {made}", expected="equal parts of a whole weight")


def for_rank(made: Expression, rank: int, ranks: int) -> Expression:
    """The same weight as another rank has it: graphs of all ranks are one, only weights differ."""
    if isinstance(made, Lone):
        return replace(made, of=for_rank(made.of, rank, ranks), holds=rank == 0)
    if isinstance(made, Shard):
        return replace(made, index=rank * made.count // ranks)
    if isinstance(made, Join):
        return replace(made, pieces=tuple(for_rank(piece, rank, ranks) for piece in made.pieces))
    if isinstance(made, (Transpose, Pack, Slice)):
        return replace(made, of=for_rank(made.of, rank, ranks))
    return made
