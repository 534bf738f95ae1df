"""Weight expressions as JSON values, and back. A table's function is a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...ir.stored_weights import Dequantized, Pack, Quantized
from ...ir.weights import Arange, Expression, Join, Lone, Shard, Slice, Source, Table, Transpose
from .graph import GraphReader, GraphWriter
from .values import CannotLoad, CannotSave, device_of, named, of_name

if TYPE_CHECKING:
    from ...passes.attention.score_pack import ScoreTable


def written(made: Expression, graphs: GraphWriter) -> list[Any]:
    """`[kind, ...]`. Raises CannotSave."""
    if isinstance(made, Source):
        return ["source", made.name, list(made.shape), named(made.dtype), str(made.device), list(made.stride)]
    if isinstance(made, Transpose):
        return ["transpose", written(made.of, graphs)]
    if isinstance(made, Join):
        return ["join", made.dim, *(written(piece, graphs) for piece in made.pieces)]
    if isinstance(made, Slice):
        return ["slice", written(made.of, graphs), made.dim, made.start, made.stop]
    if isinstance(made, Shard):
        return ["shard", written(made.of, graphs), made.dim, made.index, made.count, made.unit]
    if isinstance(made, Lone):
        return ["lone", written(made.of, graphs), made.holds]
    if isinstance(made, Dequantized):
        parts = [None if part is None else written(part, graphs) for part in (made.q, made.steps, made.zeros)]
        return ["dequantized", *parts, named(made.dtype)]
    if isinstance(made, Quantized):
        return ["quantized", written(made.of, graphs), made.storage, made.dim]
    if isinstance(made, Pack):
        return ["pack", written(made.of, graphs), made.form]
    if isinstance(made, Arange):
        return ["arange", made.size, str(made.device)]
    if isinstance(made, Table):
        from ...passes.attention.score_pack import ScoreTable

        if isinstance(made.function, ScoreTable):
            return _table(made, made.function, graphs)
    raise CannotSave(f"a weight made by {type(made).__name__}")


def _table(made: Table, scores: ScoreTable, graphs: GraphWriter) -> list[Any]:
    about = [scores.tokens, scores.kind, scores.heads, scores.limit, scores.seen]
    inputs = [[name, written(of, graphs)] for name, of in made.inputs]
    return ["scores", graphs.write(scores.mask), about, inputs, list(made.shape), named(made.dtype), str(made.device)]


def read(text: Any, graphs: GraphReader) -> Expression:
    """The inverse. Raises CannotLoad, InvalidWeight, and what a file of another shape leads to."""
    kind, *rest = text
    if kind not in _KINDS:
        raise CannotLoad(f"a weight made by {kind!r}")
    return _KINDS[kind](graphs, *rest)


def _source(graphs: GraphReader, name: str, shape: Any, dtype: str, device: str, stride: Any) -> Expression:
    return Source(name, tuple(shape), of_name("dtype", dtype), device_of(device), tuple(stride))


def _dequantized(graphs: GraphReader, q: Any, steps: Any, zeros: Any, dtype: str) -> Expression:
    parts = read(q, graphs), read(steps, graphs), None if zeros is None else read(zeros, graphs)
    return Dequantized(*parts, of_name("dtype", dtype))


def _scores(graphs: GraphReader, mask: Any, about: Any, inputs: Any, shape: Any, dtype: str, device: str) -> Expression:
    from ...passes.attention.score_pack import ScoreTable

    tokens, kind, heads, limit, seen = about
    function = ScoreTable(graphs.read(mask), tokens, kind, heads, limit, seen)
    of = tuple((name, read(part, graphs)) for name, part in inputs)
    where: torch.device = device_of(device)
    return Table(function, of, tuple(shape), of_name("dtype", dtype), where)


_KINDS: dict[str, Callable[..., Expression]] = {
    "source": _source,
    "transpose": lambda graphs, of: Transpose(read(of, graphs)),
    "join": lambda graphs, dim, *pieces: Join(tuple(read(piece, graphs) for piece in pieces), dim),
    "slice": lambda graphs, of, *where: Slice(read(of, graphs), *where),
    "shard": lambda graphs, of, *where: Shard(read(of, graphs), *where),
    "lone": lambda graphs, of, holds: Lone(read(of, graphs), holds),
    "quantized": lambda graphs, of, storage, dim: Quantized(read(of, graphs), storage, dim),
    "dequantized": _dequantized,
    "pack": lambda graphs, of, form: Pack(read(of, graphs), form),
    "arange": lambda graphs, size, device: Arange(size, device_of(device)),
    "scores": _scores,
}
