"""Tree attention's share of the memory's bandwidth, and its time beside what torch offers for the same tree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel
from treespec_compiler.codegen.gpu.trial import TOLERANCE, Workload, binary_tree, relative_error
from treespec_compiler.codegen.gpu.tune_device import Inputs

from .base import Context, copy_rate, milliseconds, reason
from .numerics import eager_attention

SPEC = AttentionKernel(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
CONTEXTS, NODES = (1024, 8192, 32768, 131072), (1, 8, 16, 64, 256)
# FlexAttention compiles seconds for each size. For 64 nodes of 4 heads its decoding kernel takes blocks of 256 rows by
# itself, which do not divide the mask's of 128, and torch 2.11 then finds no kernel at all: so the sizes are given.
SPLIT = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3}
WHOLE = {"FORCE_USE_FLEX_ATTENTION": True}
FLEX: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    (64, 32768): {"flex attention, split keys": SPLIT, "flex attention": WHOLE},
    (64, 8192): {"flex attention, split keys": SPLIT},
    (16, 32768): {"flex attention, split keys": SPLIT},
}
ORDER = [(64, 32768), (1, 32768), (64, 8192), (1, 8192), (16, 32768)]  # first what the aims are about


def run(context: Context) -> None:
    rate = copy_rate(context)
    context.keep("copy_bytes_per_second", rate)
    spec = context.pick(SPEC, AttentionKernel(4, 2, 16, 16, torch.float32, torch.float32))
    sizes = ORDER + [(n, c) for c in CONTEXTS for n in NODES if (n, c) not in ORDER]
    for nodes, length in context.pick(sizes, [(3, 20), (1, 20)]):
        what = f"{nodes} nodes behind {length} tokens"
        if context.left() < 6:
            context.skipped(what, "no time left")
            continue
        context.attempt(what, functools.partial(measure, context, spec, nodes, length, rate))
        if context.on_gpu:
            torch.cuda.empty_cache()


def measure(context: Context, spec: AttentionKernel, nodes: int, length: int, rate: float) -> None:
    """One request's tree; `rate` in bytes a second."""
    inputs = Inputs(spec, Workload(nodes, 1, length), context.device)
    calls = contenders(context, inputs, nodes, length)
    agreement = compare(context, calls, TOLERANCE[spec.dtype])
    took = milliseconds(context, calls, budget=0.25)
    ours = took["treespec"]
    context.row(
        "sizes", nodes=nodes, context=length, milliseconds=took, errors=agreement, bytes=inputs.bytes,
        of_copy=inputs.bytes / (1e-3 * ours) / rate,
        speedup={n: t / ours for n, t in took.items() if n != "treespec"},
    )  # fmt: skip


def contenders(context: Context, inputs: Inputs, nodes: int, length: int) -> dict[str, Callable[[], Tensor]]:
    """Each gives [1, Hq, N, D], or the same as [1, Hkv, Hq / Hkv * N, D], of one request whose K/V lie side by side, as
    the others need them."""
    total = length + nodes
    k, v = inputs.pool_k[:, :, :total], inputs.pool_v[:, :, :total]
    q, group = inputs.q, inputs.spec.group
    rows = torch.tensor(binary_tree(nodes)[0], device=context.device)
    tree = (rows.unsqueeze(-1) >> torch.arange(64, device=context.device) & 1).flatten(1)[:, :nodes].bool()
    mask = added_mask(torch.cat([tree.new_ones(nodes, length), tree], 1), q.dtype)
    packed = q.reshape(1, inputs.spec.kv_heads, group * nodes, -1)
    packed_mask = added_mask((mask == 0).repeat(group, 1), q.dtype)
    ours: Callable[[], Tensor] = inputs.attend if context.on_gpu else functools.partial(eager_attention, inputs)
    found: dict[str, Callable[[], Tensor]] = {"treespec": ours}

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=inputs.scale, enable_gqa=True)

    def dense_packed() -> Tensor:  # heads of a group as more rows: K and V are not repeated
        return F.scaled_dot_product_attention(packed, k, v, attn_mask=packed_mask, scale=inputs.scale)

    found["sdpa dense mask"] = dense
    found["sdpa dense mask, packed heads"] = dense_packed
    if nodes == 1:
        found |= flash_decoding(context, inputs, k, v)
    kinds = context.pick(FLEX.get((nodes, length), {}), {"flex attention": {}})
    return found | {name: flex(context, inputs, tree, length, k, v, options) for name, options in kinds.items()}


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What SDPA adds to scores, [rows, keys]; from a mask of booleans it would make this at each call.

    NOTE rows lie multiples of 16 apart, else SDPA pads them at each call.
    """
    rows, keys = seen.shape
    wide = torch.zeros(rows, -(-keys // 16) * 16, dtype=dtype, device=seen.device)
    return wide[:, :keys].masked_fill_(~seen, float("-inf"))


def flash_decoding(context: Context, inputs: Inputs, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One query needs no mask. FlashAttention by torch, heads packed or not, and by its own package if it is here."""
    backend = SDPBackend.FLASH_ATTENTION if context.on_gpu else SDPBackend.MATH
    q, spec = inputs.q, inputs.spec

    def packed() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q.view(1, spec.kv_heads, spec.group, -1), k, v, scale=inputs.scale)

    found: dict[str, Callable[[], Tensor]] = {"flash decoding (torch)": packed}
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return found
    kt, vt = (x.transpose(1, 2).contiguous() for x in (k, v))
    found["flash decoding (flash_attn)"] = lambda: flash_attn_with_kvcache(
        q.transpose(1, 2), kt, vt, softmax_scale=inputs.scale
    ).transpose(1, 2)
    return found


def flex(
    context: Context, inputs: Inputs, tree: Tensor, length: int, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Callable[[], Tensor]:
    """FlexAttention with the tree's matrix captured by the mask function; `options` of its kernel."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return (j < length) | tree[i, (j - length).clamp(min=0)]

    nodes = tree.shape[0]
    blocks = create_block_mask(visible, None, None, nodes, length + nodes, device=str(context.device))
    compiled = torch.compile(flex_attention, dynamic=False) if context.on_gpu else flex_attention
    settings = {"block_mask": blocks, "scale": inputs.scale, "enable_gqa": True, "kernel_options": options}
    return lambda: compiled(inputs.q, k, v, **settings)


def compare(context: Context, calls: dict[str, Callable[[], Tensor]], tolerance: float) -> dict[str, float]:
    """How far each is from ours; one that fails or computes something else is taken out of `calls`."""
    ours, found = calls["treespec"]().clone(), {}
    for name, call in list(calls.items()):
        if name == "treespec":
            continue
        try:
            found[name] = relative_error(call().reshape(ours.shape), ours)
        except Exception as error:
            context.skipped(name, reason(error))
            del calls[name]
            continue
        if not found[name] <= 2 * tolerance:  # NaN as well
            context.skipped(name, f"{found[name]:.1e} away from treespec's")
            del calls[name]
    return found
