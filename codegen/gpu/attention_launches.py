"""The launches of `attend` and `merge`, the generated kernels of tree attention."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import source as files
from .launch import Launch, on_meta
from .sizes import power_of_two
from .tree_attention_source import source
from .tree_attention_spec import MAX_SPLITS, AttentionKernel, Config, merge_warps

UNUSED = 16  # for a size that is not read, so that it does not select a compilation


def module(spec: AttentionKernel) -> ModuleType:
    """The generated module with the kernels `attend` and `merge`."""
    return files.load("tree_attention", spec.key(), source(spec))


def blocks_of(spec: AttentionKernel, config: Config, nodes: int, requests: int) -> int:
    """Of rows; those of ragged requests are fewer."""
    return -(-nodes * spec.group // config.block_m) + requests - 1


def attention_launches(
    spec: AttentionKernel,
    config: Config,
    splits: int,
    out: Tensor,
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    positions: Tensor,
    node_offsets: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> list[Launch]:
    """`attend`, and `merge` behind it where committed tokens are shared out; to `out` [1, T, Hq, Dv].

    As `tree_attention.attend` for `splits` shares, scales above 0, and tensors whose last dimension is contiguous.
    """
    kernels, parts = module(spec), splits + 1 if splits > 1 else 1
    nodes, requests, pages = q.shape[2], prefix_lens.shape[0], page_table.shape[1]
    partial, lse = out, out
    if parts > 1:
        partial = q.new_empty(parts, nodes, spec.heads, spec.value_dim, dtype=torch.float32)
        lse = q.new_empty(parts, nodes, spec.heads, dtype=torch.float32)
    step = (positions, node_offsets, page_table, prefix_lens, tree_lens)
    tables = [t.contiguous() for t in (slopes, bias, sinks) if t is not None]
    attend = Launch(
        kernels.attend,
        (blocks_of(spec, config, nodes, requests), spec.kv_heads, parts),
        (
            q, pool_k, pool_v, partial, lse, *(t.contiguous() for t in step),
            ancestors.contiguous().view(torch.int32), *tables, *(() if bias is None else (bias.shape[1],)),
            scale, nodes, requests, splits, 2 * ancestors.shape[1], pages, pool_k.shape[2] if pages > 1 else UNUSED,
            q.stride(1), q.stride(2), *pool_k.stride()[:3], *pool_v.stride()[:3],
        ),
        {
            **config.constexprs(), "REQUESTS": _room(requests), "ONE_PAGE": pages == 1, "SPLIT": parts > 1,
            "CHAIN": ancestors.shape[1] == 0,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    if parts == 1:
        return [attend]
    rows, after = nodes * spec.heads, [] if sinks is None else tables[-1:]
    merge = Launch(
        kernels.merge,
        (rows,),
        (partial, lse, out, node_offsets.contiguous(), *after, requests, rows, parts),
        {"PARTS": power_of_two(parts)},
        merge_warps(spec, parts),
    )
    return [attend, merge]


def _room(requests: int) -> int:
    """What a kernel is compiled for: few different sizes, since each compilation takes seconds."""
    return 1 if requests == 1 else max(8, power_of_two(requests))


def launches_on_meta(
    spec: AttentionKernel,
    config: Config,
    splits: int = MAX_SPLITS,
    *,
    requests: int = 1,
    pages: int = 1,
    chain: bool = False,
    nodes: int = 64,
    page_size: int = 4096,
) -> list[Launch]:
    """Those of a step, to be compiled: tensors laid out as a model makes them. `nodes` and `page_size`: any sizes that
    are no special case."""

    def pool(dim: int) -> Tensor:
        return on_meta(requests * pages, spec.kv_heads, page_size, dim, dtype=spec.pool_dtype)

    q = on_meta(1, nodes, spec.heads, spec.key_dim, dtype=spec.dtype).transpose(1, 2)
    out = on_meta(1, nodes, spec.heads, spec.value_dim, dtype=spec.dtype)
    step = (on_meta(nodes), on_meta(requests + 1), on_meta(requests, pages), on_meta(requests), on_meta(requests))
    ancestors = on_meta(nodes, 0 if chain else -(-nodes // 64))
    tables = {"slopes": (spec.heads,), "bias": (spec.heads, 128), "sinks": (spec.heads,)}
    changes = {name: on_meta(*tables[name], dtype=torch.float32) for name in spec.tables}
    return attention_launches(
        spec, config, splits, out, q, pool(spec.key_dim), pool(spec.value_dim), *step, ancestors, 0.1, **changes
    )
