"""The kernels that a tree program launches on a GPU, each with what it takes to compile it anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir import accept, ops, stochastic_accept
from treespec_compiler.ir.library import arguments, definition
from treespec_compiler.ir.scores import SOFTMAX
from treespec_compiler.ir.specs import AttentionSpec, MaskSpec

from .. import tables
from .append import append_launch, rope_append_launch
from .attention_launches import launches_on_meta
from .launch import Launch, on_meta
from .recurrence import recurrence_launch, takes
from .recurrence_check import RecurrenceShape
from .sizes import PROMPT_CHUNK
from .tree_attention_spec import AttentionKernel, Config, default_config


@dataclass(frozen=True)
class Listed:
    """A kernel as it is launched, and what for."""

    op: str
    what: str
    """For which sites or sizes."""
    launch: Launch
    measured: bool | None = None
    """Whether a tuning table holds its configuration; None where there is nothing to choose."""

    @property
    def name(self) -> str:
        return self.launch.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def constants(self) -> Mapping[str, Any]:
        """What its compilation knows, strides of 1 included."""
        return self.launch.signature()[1]

    @property
    def file(self) -> Path:
        """Where its source lies."""
        return Path(self.launch.kernel.fn.__code__.co_filename)

    @property
    def source(self) -> str:
        """The file's text, with what the kernel calls."""
        return self.file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Turn:
    """How an attention site rotates its q and k: what its kernel is compiled for."""

    style: str
    rotary: int
    width: int
    """Columns of cos and sin."""
    dtype: torch.dtype
    """Of cos and sin."""


def turns(graph: fx.Graph) -> dict[int, Turn]:
    """By site: the rotations that are part of attention."""
    found = {}
    for node in graph.nodes:
        if definition(node.target) is ops.tree_attention:
            call = arguments(node)
            if call["cos"] is not None:
                value = call["cos"].meta["val"]
                found[node.meta["site"]] = Turn(call["style"], call["rotary"], value.shape[1], value.dtype)
    return found


def recurrences(graph: fx.Graph) -> dict[RecurrenceShape, list[int]]:
    """The recurrences that there is a kernel for, and which of the graph's are of that shape, counted from 0."""
    found: dict[RecurrenceShape, list[int]] = {}
    calls = [arguments(node) for node in graph.nodes if definition(node.target) is ops.tree_recurrence]
    for index, nodes in enumerate(calls):
        call = fx.node.map_arg(nodes, lambda n: n.meta["val"])
        if takes(call):
            found.setdefault(RecurrenceShape.of(call), []).append(index)
    return found


def attention_kernel(site: AttentionSpec) -> AttentionKernel:
    """What the kernel of an attention site is generated for."""
    return AttentionKernel(
        heads=site.heads,
        kv_heads=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        dtype=site.dtype,
        pool_dtype=site.dtype,
        mask=MaskSpec(site.mask.window, None, site.mask.chunk),
        softcap=float(site.softcap),
        slopes=site.bias.startswith("slope"),
        bias=site.bias.startswith("bias"),
        sinks=site.sinks,
    )


def attention_kernels(sites: Sequence[AttentionSpec]) -> dict[AttentionKernel, list[int]]:
    """Each distinct kernel, and the sites that launch it."""
    found: dict[AttentionKernel, list[int]] = {}
    for site in sites:
        if not site.mask.pattern and site.activation == SOFTMAX:  # those are ATen's
            found.setdefault(attention_kernel(site), []).append(site.index)
    return found


def inventory(
    sites: Sequence[AttentionSpec],
    vocab_size: int,
    dtype: torch.dtype,
    target: str,
    nodes: Sequence[int] = (1, 64),
    turns: Mapping[int, Turn] | None = None,
    recurrences: Mapping[RecurrenceShape, list[int]] | None = None,
) -> Iterator[Listed]:
    """Every kernel of a program with these sites, for trees of so many nodes; needs triton.

    `turns`: by site, the rotations that are part of attention (`turns`). `recurrences`: those of its graph.
    """
    for spec, indices in attention_kernels(sites).items():
        yield from _attention(spec, _where(indices), target, nodes)
        by_turn: dict[Turn | None, list[int]] = {}
        for index in indices:
            by_turn.setdefault((turns or {}).get(index), []).append(index)
        for turn, turned in by_turn.items():
            yield _append(spec, turn, _where(turned))
    for shape, indices in (recurrences or {}).items():
        for chain in (False, True):
            what = "prompts" if chain else "trees"
            yield Listed("tree_recurrence", f"{_where(indices)}, {what}", recurrence_on_meta(shape, chain))
    if sites:
        yield _commit(sites)
    yield from _accept(vocab_size, dtype, max(nodes))
    yield from _accept_by_chance(vocab_size, max(nodes))


def _where(sites: Sequence[int]) -> str:
    return f"site {sites[0]}" if len(sites) == 1 else f"{len(sites)} sites from {sites[0]} on"


def chosen_config(
    spec: AttentionKernel, nodes: int, target: str, capacity: int = 4096, *, chain: bool = False
) -> tuple[Config, bool]:
    """What one request's tree (or prompt: `chain`) is launched with on this target, and whether that was measured."""
    measured = tables.lookup("tree_attention", target, spec.tuning_key(nodes, 1, capacity, chain))
    return (Config.parse(measured), True) if measured else (default_config(spec, nodes * spec.group, target), False)


def _attention(spec: AttentionKernel, where: str, target: str, nodes: Sequence[int]) -> Iterator[Listed]:
    by_config: dict[tuple[Config, bool], list[int]] = {}
    for count in nodes:
        by_config.setdefault(chosen_config(spec, count, target), []).append(count)
    for (config, measured), counts in by_config.items():
        what = f"{' or '.join(map(str, counts))} {'node' if counts == [1] else 'nodes'}"
        attend, merge = launches_on_meta(spec, config)
        yield Listed("tree_attention", f"{where}, {what}", attend, measured)
    config, measured = chosen_config(spec, PROMPT_CHUNK, target, chain=True)
    (attend,) = launches_on_meta(spec, config, 1, chain=True)
    yield Listed("tree_attention", f"{where}, prompts", attend, measured)
    yield Listed("tree_attention", where, merge)


NODES, PAGE = 64, 4096
"""Of a step whose kernels are compiled: any sizes that are no special case, as launches do not depend on them."""


def _append(spec: AttentionKernel, turn: Turn | None, where: str) -> Listed:
    def projected(heads: int, dim: int) -> Tensor:  # as a model makes it: [1, T, H, D] transposed
        return on_meta(1, NODES, heads, dim, dtype=spec.dtype).transpose(1, 2)

    k, v = projected(spec.kv_heads, spec.key_dim), projected(spec.kv_heads, spec.value_dim)
    pool_k, pool_v = (
        on_meta(2, spec.kv_heads, PAGE, dim, dtype=spec.pool_dtype) for dim in (spec.key_dim, spec.value_dim)
    )
    index = on_meta(NODES)
    if turn is None:
        return Listed("append", where, append_launch(k, v, pool_k, pool_v, index))
    q, angles = projected(spec.heads, spec.key_dim), on_meta(NODES, turn.width, dtype=turn.dtype)
    launch = rope_append_launch(q, k, v, q.contiguous(), pool_k, pool_v, index, angles, angles, turn.style, turn.rotary)
    return Listed("rope_append", where, launch)


def recurrence_on_meta(shape: RecurrenceShape, chain: bool) -> Launch:
    """As projections give it its operands: contiguous."""

    def of(*size: int) -> Tensor:
        return on_meta(1, NODES, *size, dtype=shape.dtype)

    decay = of(shape.heads) if shape.rows == 1 else of(shape.heads, shape.rows)
    beta = of(shape.heads) if shape.delta else None
    q, v = of(shape.key_heads, shape.key_dim), of(shape.heads, shape.value_dim)
    stash = on_meta(NODES, shape.width, dtype=shape.kept)
    state = on_meta(2, shape.heads, shape.key_dim, shape.value_dim, dtype=shape.kept)
    words = on_meta(NODES, 0 if chain else 1)
    step = (on_meta(3), on_meta(2), on_meta(2), words, on_meta(2), on_meta(NODES))
    return recurrence_launch(q, q, v, decay, beta, stash, state, *step, out=v)


def _commit(sites: Sequence[AttentionSpec]) -> Listed:
    from .commit import commit_launch

    width = max(max(s.key_dim, s.value_dim) * s.dtype.itemsize // 4 for s in sites)
    lanes = on_meta(2 * sum(s.kv_heads for s in sites), 4)
    launch = commit_launch(lanes, on_meta(NODES), on_meta(NODES), PAGE, 4, width)
    return Listed("commit_path", f"all {len(sites)} sites", launch)


def _accept(vocab_size: int, dtype: torch.dtype, nodes: int) -> Iterator[Listed]:
    from .accept import accept_launches

    numbers, offsets = on_meta(nodes), on_meta(2)
    logits, out = on_meta(nodes, vocab_size, dtype=dtype), on_meta(accept.FIELDS + nodes)
    for launch in accept_launches(logits, numbers, numbers, offsets, out, 0.0):
        yield Listed("greedy_accept", f"{nodes} nodes, {vocab_size} ids", launch)


def _accept_by_chance(vocab_size: int, nodes: int) -> Iterator[Listed]:
    from .stochastic_accept import chance_launches

    numbers, offsets, draws = on_meta(nodes), on_meta(2), on_meta(nodes - 1)
    p, uniforms = on_meta(nodes, vocab_size, dtype=torch.float64), on_meta(1, 2 * nodes, dtype=torch.float64)
    out, drawn = on_meta(stochastic_accept.FIELDS + nodes), (on_meta(nodes + 1), draws, draws)
    step = (p, p, numbers, numbers, offsets, *drawn, uniforms, out)
    launches = {rule: chance_launches(*step, rule, 1) for rule in ("recursive", "traversal")}
    for at in (0, 1):  # what is owed, then the walks
        for rule, each in launches.items():
            yield Listed("stochastic_accept", f"{rule}, {vocab_size} ids", each[at])
