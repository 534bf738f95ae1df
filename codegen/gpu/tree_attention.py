"""`treespec_triton::tree_attention`: generated Triton kernels over paged K/V pools."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.attention import stored
from treespec_compiler.ir.device import profile
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.specs import MaskSpec

from .. import tables
from . import prompt, self_check
from .append import append, rope_append
from .attention_launches import attention_launches, blocks_of
from .tree_attention_spec import AttentionKernel, Config, default_config, split_count

OP = "tree_attention"


def attend(
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
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention over K/V that are in the pools already: `ir.attention.reference` without the write, with a page table.

    Tensors of any strides; one whose last dimension is not contiguous is copied. A node comes after its ancestors,
    so no bit above its own is set. Launches depend on shapes only and nothing is read back: they can be captured in a
    CUDA graph. `config` and `splits` default to what was measured or is sensible; what is chosen so is checked on the
    device before its first use, and WrongKernel raised where it is wrong. Returns [1, Hq, T, Dv], laid out as
    [1, T, Hq, Dv].
    """
    spec = AttentionKernel(
        q.shape[1], pool_k.shape[1], q.shape[3], pool_v.shape[3], q.dtype, pool_k.dtype, MaskSpec(window, None, chunk),
        float(softcap), slopes is not None, bias is not None, sinks is not None,
    )  # fmt: skip
    nodes, requests, pages = q.shape[2], prefix_lens.shape[0], page_table.shape[1]
    capacity = pages * pool_k.shape[2]
    out = q.new_empty(1, nodes, spec.heads, spec.value_dim)
    if nodes == 0 or requests == 0:
        return out.zero_().transpose(1, 2)
    q, pool_k, pool_v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, pool_k, pool_v))
    _check_extents(q, pool_k, pool_v)
    if scale <= 0:
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)  # the kernel's maxima need it above 0
    device = profile(q.device).number(q.device)  # -1: the interpreter
    chain, given_config = ancestors.shape[1] == 0, config
    config = config or _config(spec, nodes, requests, capacity, device, chain)
    blocks = blocks_of(spec, config, nodes, requests)
    if splits is None:
        reach = min(capacity, window + nodes if window else capacity, chunk + nodes if chunk else capacity)
        splits = split_count(spec, blocks * spec.kv_heads, reach, config, _processors(device))
    if given_config is None and device >= 0:
        self_check.confirm(attend, spec, config, splits > 1, requests > 1, chain, q.device)
    step = (positions, node_offsets, page_table, prefix_lens, tree_lens, ancestors, scale)
    for launch in attention_launches(spec, config, splits, out, q, pool_k, pool_v, *step, slopes, bias, sinks):
        launch.run()
    return out.transpose(1, 2)


def _check_extents(q: Tensor, *pools: Tensor) -> None:
    """The kernel counts within a head's page, and within q, in 32 bits."""
    extents = {"q": q.shape[1] * abs(q.stride(1)) + q.shape[2] * abs(q.stride(2))}
    extents |= {"a head's page of K or V": max(pool.shape[2] * abs(pool.stride(2)) for pool in pools)}
    for name, extent in extents.items():
        if extent >= 2**31:
            raise ValueError(
                f"got {name} over {extent} numbers, expected fewer than 2**31. Lay pools out as "
                "[pages, heads, tokens, dim], or pass fewer nodes at once."
            )


@functools.lru_cache(4096)
def _config(spec: AttentionKernel, nodes: int, requests: int, capacity: int, device: int, chain: bool) -> Config:
    each = -(-nodes // requests)  # a block holds rows of one request
    arch = tables.architecture(f"cuda:{device}") if device >= 0 else ""
    measured: Mapping[str, int] | None = None
    if arch:
        measured = tables.lookup(OP, arch, spec.tuning_key(each, requests, capacity, chain))
    return Config.parse(measured) if measured else default_config(spec, each * spec.group, arch)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


def attend_stored(
    q: Tensor, pool_k: Tensor, pool_v: Tensor, positions: Tensor, write_index: Tensor, node_offsets: Tensor,
    page_table: Tensor, prefix_lens: Tensor, tree_lens: Tensor, ancestors: Tensor, scale: float, *rest: Any,
) -> Tensor:  # fmt: skip
    """`attend` after the write, prompts into an empty slot included; `rest`: of the op's schema, from `window` on."""
    new_k, new_v, table = stored(pool_k, pool_v, page_table, write_index)
    if prompt.is_causal_prompt(page_table, ancestors, scale, *rest) and prompt.flash_takes(q, new_k, new_v):
        return prompt.causal_attention(q, new_k, new_v, scale)
    return attend(q, new_k, new_v, positions, node_offsets, table, prefix_lens, tree_lens, ancestors, scale, *rest)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    positions: Tensor,
    write_index: Tensor,
    node_offsets: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    tree_lens: Tensor,
    ancestors: Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    style: str = "half",
    rotary: int = 0,
) -> Tensor:
    """One launch that writes, and turns q and k where they come unturned; then `attend`."""
    if cos is None or sin is None:
        append(k, v, pool_k, pool_v, write_index)
    else:
        q = rope_append(q, k, v, pool_k, pool_v, write_index, cos, sin, style, rotary)
    return attend_stored(
        q, pool_k, pool_v, positions, write_index, node_offsets, page_table, prefix_lens, tree_lens, ancestors,
        scale, window, chunk, softcap, slopes, bias, sinks,
    )  # fmt: skip


TREE_ATTENTION: OpOverload = implement(ops.tree_attention, "treespec_triton", tree_attention)
