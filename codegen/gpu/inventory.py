"""The kernels that a tree program launches on a GPU, each with what it takes to compile it anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from treespec_compiler.ir import accept, ops, stochastic_accept
from treespec_compiler.ir.library import arguments, definition
from treespec_compiler.ir.specs import AttentionSpec, MaskSpec

from .. import tables
from .append import append_launch, rope_append_launch
from .launch import Launch
from .offline import Offline, compile_offline
from .sizes import PROMPT_CHUNK, power_of_two
from .tree_attention_spec import DTYPES, MAX_PARTS, AttentionKernel, Config, default_config, merge_warps


@dataclass(frozen=True)
class Listed:
    """A kernel as it is launched: its arguments' types, its constants, and how Triton compiles it."""

    op: str
    name: str
    what: str
    """For which sites or sizes."""
    kernel: Any = field(repr=False)
    signature: Mapping[str, str] = field(repr=False)
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = field(repr=False, default=())
    num_warps: int = 4
    num_stages: int = 2
    measured: bool | None = None
    """Whether a tuning table holds its configuration; None where there is nothing to choose."""

    @property
    def file(self) -> Path:
        """Where its source lies."""
        return Path(self.kernel.fn.__code__.co_filename)

    @property
    def source(self) -> str:
        """The file's text, with what the kernel calls."""
        return self.file.read_text(encoding="utf-8")

    def compile(self, target: str) -> Offline:
        """For a target that need not be there; see `compile_offline`."""
        return compile_offline(
            self.kernel, self.signature, self.constexprs, target, self.num_warps, self.num_stages, self.divisible
        )


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
        found.setdefault(attention_kernel(site), []).append(site.index)
    return found


def inventory(
    sites: Sequence[AttentionSpec],
    vocab_size: int,
    dtype: torch.dtype,
    target: str,
    nodes: Sequence[int] = (1, 64),
    turns: Mapping[int, Turn] | None = None,
) -> Iterator[Listed]:
    """Every kernel of a program with these sites, for trees of so many nodes; needs triton.

    `turns`: by site, the rotations that are part of attention (`turns`).
    """
    for spec, indices in attention_kernels(sites).items():
        yield from _attention(spec, _where(indices), target, nodes)
        by_turn: dict[Turn | None, list[int]] = {}
        for index in indices:
            by_turn.setdefault((turns or {}).get(index), []).append(index)
        for turn, turned in by_turn.items():
            yield _append(spec, turn, _where(turned))
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
    from . import tree_attention

    module = tree_attention.module(spec)

    def attend(what: str, config: Config, measured: bool, **variant: bool) -> Listed:
        return Listed(
            "tree_attention",
            "attend",
            f"{where}, {what}",
            module.attend,
            tree_attention.signature(spec, split=variant.get("split", False)),
            tree_attention.constexprs(config, **variant),
            tuple(tree_attention.divisible(spec)),
            config.num_warps,
            config.num_stages,
            measured,
        )

    by_config: dict[tuple[Config, bool], list[int]] = {}
    for count in nodes:
        by_config.setdefault(chosen_config(spec, count, target), []).append(count)
    for (config, measured), counts in by_config.items():
        what = f"{' or '.join(map(str, counts))} {'node' if counts == [1] else 'nodes'}"
        yield attend(what, config, measured, split=True)
    yield attend("prompts", *chosen_config(spec, PROMPT_CHUNK, target, chain=True), chain=True)
    pointers = {"partial": "*fp32", "lse": "*fp32", "out": f"*{DTYPES[spec.dtype]}", "node_offsets": "*i64"}
    pointers |= {"sinks": "*fp32"} if spec.sinks else {}
    sizes = dict.fromkeys(("requests", "rows", "parts"), "i32")
    aligned = ("partial", "lse", "out")
    parts = {"PARTS": MAX_PARTS}
    yield Listed(
        "tree_attention", "merge", where, module.merge, pointers | sizes, parts, aligned, merge_warps(spec, MAX_PARTS)
    )


NODES, PAGE = 64, 4096
"""Of a step whose kernels are compiled: any sizes that are no special case, as launches do not depend on them."""


def _on_meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _append(spec: AttentionKernel, turn: Turn | None, where: str) -> Listed:
    def projected(heads: int, dim: int) -> Tensor:  # as a model makes it: [1, T, H, D] transposed
        return _on_meta(1, NODES, heads, dim, dtype=spec.dtype).transpose(1, 2)

    k, v = projected(spec.kv_heads, spec.key_dim), projected(spec.kv_heads, spec.value_dim)
    pool_k, pool_v = (
        _on_meta(2, spec.kv_heads, PAGE, dim, dtype=spec.pool_dtype) for dim in (spec.key_dim, spec.value_dim)
    )
    index = _on_meta(NODES)
    if turn is None:
        return _listed("append", where, append_launch(k, v, pool_k, pool_v, index))
    q, angles = projected(spec.heads, spec.key_dim), _on_meta(NODES, turn.width, dtype=turn.dtype)
    launch = rope_append_launch(q, k, v, q.contiguous(), pool_k, pool_v, index, angles, angles, turn.style, turn.rotary)
    return _listed("rope_append", where, launch)


def _commit(sites: Sequence[AttentionSpec]) -> Listed:
    from .commit import commit_launch

    width = max(max(s.key_dim, s.value_dim) * s.dtype.itemsize // 4 for s in sites)
    lanes = _on_meta(2 * sum(s.kv_heads for s in sites), 4)
    launch = commit_launch(lanes, _on_meta(NODES), _on_meta(NODES), PAGE, 4, width)
    return _listed("commit_path", f"all {len(sites)} sites", launch)


def _accept(vocab_size: int, dtype: torch.dtype, nodes: int) -> Iterator[Listed]:
    from .accept import accept_launches

    numbers, offsets = _on_meta(nodes), _on_meta(2)
    logits, out = _on_meta(nodes, vocab_size, dtype=dtype), _on_meta(accept.FIELDS + nodes)
    for launch in accept_launches(logits, numbers, numbers, offsets, out, 0.0):
        yield _listed("greedy_accept", f"{nodes} nodes, {vocab_size} ids", launch)


def chance_pointers(kernel: Any) -> dict[str, str]:
    """Types of the pointers that a kernel of `stochastic_accept` takes."""
    floats = ["p", "q", "uniforms", "weights", "ratios", "totals", "lefts", "sums"]
    floats += ["first_weights", "next_weights", "last_weights"]
    integers = ["tokens", "parents", "node_offsets", "draw_offsets", "draw_rows", "draw_q", "draw_of", "out"]
    types = dict.fromkeys(floats, "*fp64") | dict.fromkeys(integers, "*i64")
    return {name: kind for name, kind in types.items() if name in kernel.arg_names}


def _accept_by_chance(vocab_size: int, nodes: int) -> Iterator[Listed]:
    from . import stochastic_accept as by_chance
    from .kernels import stochastic_accept as kernels

    block = min(by_chance.BLOCK, power_of_two(vocab_size))
    walk = {"FIELDS": stochastic_accept.FIELDS, "BLOCKS": power_of_two(-(-vocab_size // block))}
    walk["BLOCK_N"] = by_chance.walk_block(nodes)
    for kernel, rule, constants in (
        (kernels.residual_kernel, "recursive", {"REPLACEMENT": False, "WEIGHTED": False}),
        (kernels.residual_kernel, "traversal", {"REPLACEMENT": False, "WEIGHTED": True}),
        (kernels.chance_walk_kernel, "recursive", {"NAIVE": False, "REPLACEMENT": False, **walk}),
        (kernels.traversal_kernel, "traversal", walk),
    ):
        pointers, constants = chance_pointers(kernel), {**constants, "BLOCK": block}
        integers = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in constants}
        known = [name for name in pointers if name not in kernel.do_not_specialize_on_alignment]
        name = kernel.fn.__name__.removesuffix("_kernel")
        what = f"{rule}, {vocab_size} ids"
        yield Listed("stochastic_accept", name, what, kernel, {**pointers, **integers}, constants, tuple(known))


def _listed(op: str, where: str, launch: Launch) -> Listed:
    types, constants, aligned = launch.signature()
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    return Listed(op, name, where, launch.kernel, types, constants, aligned, launch.num_warps)
