"""`treespec_triton::tree_attention`: generated Triton kernels over paged K/V pools."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.attention import stored
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload
from treespec_compiler.ir.specs import MaskSpec

from .. import tables
from . import prompt, self_check
from . import source as files
from .append import append, rope_append
from .sizes import power_of_two
from .tree_attention_source import source
from .tree_attention_spec import DTYPES, AttentionKernel, Config, default_config, merge_warps, split_count

OP = "tree_attention"


def module(spec: AttentionKernel) -> ModuleType:
    """The generated module with the kernels `attend` and `merge`."""
    return files.load(OP, spec.key(), source(spec))


def signature(spec: AttentionKernel, *, split: bool = False) -> dict[str, str]:
    """Types of `attend`'s arguments, for compiling without a GPU."""
    pointers = {
        "q": DTYPES[spec.dtype],
        "pool_k": DTYPES[spec.pool_dtype],
        "pool_v": DTYPES[spec.pool_dtype],
        "out": "fp32" if split else DTYPES[spec.dtype],
        "lse": "fp32",
        **dict.fromkeys(METADATA, "i64"),
        "ancestors": "i32",
        **{name: "fp32" for name in ("slopes", "bias", "sinks") if getattr(spec, name)},
    }
    types = {name: f"*{kind}" for name, kind in pointers.items()} | {"scale": "fp32"}
    numbers = [*(["distances"] if spec.bias else []), "nodes", "requests", "splits", "words", "pages", *SIZES]
    return types | dict.fromkeys(numbers, "i32")


def constexprs(
    config: Config, *, requests: int = 1, one_page: bool = True, split: bool = False, chain: bool = False
) -> dict[str, Any]:
    """The constexpr arguments of `attend`."""
    return {**config.constexprs(), "REQUESTS": requests, "ONE_PAGE": one_page, "SPLIT": split, "CHAIN": chain}


def divisible(spec: AttentionKernel) -> list[str]:
    """Arguments of `attend` that are multiples of 16 where pools and queries are laid out as a model makes them."""
    named = ["q", "pool_k", "pool_v", "out", "lse", "page_size", "k_page", "k_head", "v_page", "v_head"]
    named += ["q_head", "q_node", "k_token"] if spec.key_dim % 16 == 0 else []
    return named + (["v_token"] if spec.value_dim % 16 == 0 else [])


METADATA = ("positions", "node_offsets", "page_table", "prefix_lens", "tree_lens", "ancestors")
UNUSED = 16  # for a size that is not read, so that it does not select a compilation
SIZES = ("page_size", "q_head", "q_node", "k_page", "k_head", "k_token", "v_page", "v_head", "v_token")


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
    device = _device_key(q.device)
    chain, given_config = ancestors.shape[1] == 0, config
    config = config or _config(spec, nodes, requests, capacity, device, chain)
    blocks = -(-nodes * spec.group // config.block_m) + requests - 1  # of ragged requests, at most
    if splits is None:
        reach = min(capacity, window + nodes if window else capacity, chunk + nodes if chunk else capacity)
        splits = split_count(spec, blocks * spec.kv_heads, reach, config, _processors(device))
    kernels, parts = module(spec), splits + 1 if splits > 1 else 1
    if given_config is None and device >= 0:
        self_check.confirm(attend, spec, config, parts > 1, requests > 1, chain, q.device)
    partial, lse = out, out
    if parts > 1:
        partial = q.new_empty(parts, nodes, spec.heads, spec.value_dim, dtype=torch.float32)
        lse = q.new_empty(parts, nodes, spec.heads, dtype=torch.float32)
    given = {name: t for name, t in (("slopes", slopes), ("bias", bias), ("sinks", sinks)) if t is not None}
    with torch.cuda.device_of(q):
        kernels.attend[(blocks, spec.kv_heads, parts)](
            q, pool_k, pool_v, partial, lse,
            *(t.contiguous() for t in (positions, node_offsets, page_table, prefix_lens, tree_lens)),
            ancestors.contiguous().view(torch.int32), **{name: t.contiguous() for name, t in given.items()},
            **({"distances": bias.shape[1]} if bias is not None else {}),
            scale=scale, nodes=nodes, requests=requests, splits=splits, words=2 * ancestors.shape[1],
            pages=pages, page_size=pool_k.shape[2] if pages > 1 else UNUSED, q_head=q.stride(1), q_node=q.stride(2),
            k_page=pool_k.stride(0), k_head=pool_k.stride(1), k_token=pool_k.stride(2),
            v_page=pool_v.stride(0), v_head=pool_v.stride(1), v_token=pool_v.stride(2),
            **constexprs(config, requests=_request_room(requests), one_page=pages == 1, split=parts > 1,
                         chain=chain),
            **config.options(), enable_fp_fusion=True,
        )  # fmt: skip
        if parts > 1:
            kernels.merge[(nodes * spec.heads,)](
                partial, lse, out, node_offsets, **({"sinks": sinks.contiguous()} if sinks is not None else {}),
                requests=requests, rows=nodes * spec.heads, parts=parts, PARTS=power_of_two(parts),
                num_warps=merge_warps(spec, parts), enable_fp_fusion=True,
            )  # fmt: skip
    return out.transpose(1, 2)


def _request_room(requests: int) -> int:
    """What a kernel is compiled for: few different sizes, since each compilation takes seconds."""
    return 1 if requests == 1 else max(8, power_of_two(requests))


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


def _device_key(device: torch.device) -> int:
    """An index of a GPU, -1 for the interpreter on a CPU."""
    return (torch.cuda.current_device() if device.index is None else device.index) if device.type == "cuda" else -1


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
