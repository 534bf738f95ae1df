"""Every kernel on the device against its reference in float64 (those that copy or choose: bit for bit)."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel
from treespec_compiler.codegen.gpu.trial import TOLERANCE, Workload, relative_error
from treespec_compiler.codegen.gpu.tune_device import Inputs
from treespec_compiler.ir import accept, commit, ops
from treespec_compiler.ir import attention as reference
from treespec_compiler.ir import stochastic_accept as stochastic
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.ir.specs import MaskSpec

from .base import Context, reason

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def spec(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype = BF16, value: int = 0, **more: Any
) -> AttentionKernel:
    return AttentionKernel(heads, kv_heads, dim, value or dim, dtype, dtype, **more)


FAMILIES = {
    "llama bf16": spec(32, 8, 128),
    "llama fp16": spec(32, 8, 128, FP16),
    "llama fp32": spec(32, 8, 128, FP32),
    "dim 64": spec(32, 8, 64),
    "dim 32": spec(8, 2, 32),
    "dim 40": spec(8, 8, 40),
    "dim 80, no groups": spec(8, 8, 80),
    "dim 96": spec(8, 2, 96),
    "dim 112": spec(8, 2, 112),
    "dim 136": spec(8, 2, 136),
    "dim 160": spec(8, 2, 160),
    "dim 256": spec(8, 4, 256),
    "keys 64, values 32": spec(8, 2, 64, value=32),
    "keys 128, values 96": spec(8, 2, 128, value=96),
    "MLA 192 + 128": spec(16, 16, 192, value=128),
    "window": spec(32, 8, 128, mask=MaskSpec(128)),
    "chunk": spec(32, 8, 128, mask=MaskSpec(0, None, 128)),
    "softcap": spec(8, 4, 256, softcap=50.0),
    "slopes": spec(16, 16, 64, slopes=True),
    "bias": spec(8, 8, 64, bias=True),
    "sinks, window": spec(64, 8, 64, sinks=True, mask=MaskSpec(128)),
}
# Each size and dtype is compiled, which takes most of the time: the first family gets all, the others the hardest.
CASES = (Workload(70, 2, 300), Workload(1, 1, 1000), Workload(16, 3, 300))
# Torch's grouped product takes the first; the others are every row times every matrix.
GROUPED = {"bf16": (BF16, 1024), "bf16, rows of 2008 bytes": (BF16, 1004), "fp16": (FP16, 1024), "fp32": (FP32, 1024)}


def run(context: Context, part: str = "0", parts: str = "1") -> None:
    """Every `parts`-th check, from number `part` on."""
    for name, (check, tolerance) in list(checks(context).items())[int(part) :: int(parts)]:
        if context.left() < 5:
            context.skipped(name, "no time left")
        else:
            attempt(context, name, check, tolerance)


def checks(context: Context) -> dict[str, tuple[Callable[[], float], float]]:
    """By name: what gives an error, and the largest that is right."""
    families = dict(list(FAMILIES.items())[:2]) if context.smoke else FAMILIES
    found: dict[str, tuple[Callable[[], float], float]] = {}
    for name, kernel in families.items():
        cases = context.pick(CASES if name == "llama bf16" else CASES[:1], (Workload(3, 2, 20),))
        found[name] = functools.partial(attention, context, kernel, cases), TOLERANCE[kernel.dtype]
    for style in ("half", "interleaved"):
        found[f"rope and append, {style}"] = functools.partial(rope, context, style), TOLERANCE[BF16]
    for name, (dtype, inner) in GROUPED.items():
        found[f"grouped linear, {name}"] = functools.partial(grouped_linear, context, dtype, inner), TOLERANCE[dtype]
    exact = {
        "append": append,
        "commit path": commit_path,
        "greedy accept": greedy_accept,
        "stochastic accept": stochastic_accept,
    }
    return found | {name: (functools.partial(check, context), 0.0) for name, check in exact.items()}


def attempt(context: Context, name: str, check: Callable[[], float], tolerance: float) -> None:
    """A kernel that fails does not keep the others from being checked."""
    try:
        error = check()
    except Exception as problem:
        context.row("kernels", name=name, ok=False, error=reason(problem))
        return
    # NaN is wrong too
    context.row("kernels", name=name, ok=bool(error <= tolerance), error=error, tolerance=tolerance)


def attention(context: Context, kernel: AttentionKernel, cases: tuple[Workload, ...]) -> float:
    worst = 0.0
    for seed, shape in enumerate(cases):
        inputs = Inputs(kernel, shape, context.device, seed)
        expected = inputs.expected()
        for splits in (1, 3):
            found = inputs.attend(splits=splits) if context.on_gpu else eager_attention(inputs)
            worst = max(worst, relative_error(found, expected)) if not found.isnan().any() else float("nan")
    return worst


def eager_attention(inputs: Inputs) -> torch.Tensor:
    """ATen's answer, where there is no GPU."""
    at = inputs.write_index.view(inputs.shape.requests, -1) % inputs.shape.capacity
    request = torch.arange(inputs.shape.requests)[:, None]
    k, v = (p[request, :, at].flatten(0, 1).transpose(0, 1).unsqueeze(0) for p in (inputs.pool_k, inputs.pool_v))
    return reference.reference(
        inputs.q, k, v, inputs.pool_k, inputs.pool_v, inputs.positions, inputs.write_index, inputs.node_offsets,
        inputs.page_table, inputs.prefix_lens, inputs.tree_lens, inputs.ancestors, inputs.scale, *inputs.changes(),
    )  # fmt: skip


def rope(context: Context, style: str) -> float:
    """Rotation, append and attention in one op; its pools are compared as well."""
    kernel = context.pick(FAMILIES["dim 64"], spec(4, 2, 16))
    inputs = Inputs(kernel, context.pick(Workload(20, 2, 300), Workload(3, 2, 20)), context.device)
    nodes, rotary = inputs.q.shape[2], kernel.key_dim // 2
    k, v = (torch.randn(1, kernel.kv_heads, nodes, kernel.key_dim, device=context.device).to(BF16) for _ in range(2))
    angles = torch.rand(nodes, rotary // 2, device=context.device) * 6
    meta = inputs.positions, inputs.write_index, inputs.node_offsets, inputs.page_table
    meta += inputs.prefix_lens, inputs.tree_lens, inputs.ancestors

    def outcome(target: Any, dtype: torch.dtype) -> torch.Tensor:
        q, keys, values, pool_k, pool_v = (
            t.to(dtype, copy=True) for t in (inputs.q, k, v, inputs.pool_k, inputs.pool_v)
        )
        cos, sin = (x.to(BF16).to(dtype) for x in (angles.cos(), angles.sin()))
        out = target(q, keys, values, pool_k, pool_v, *meta, inputs.scale, cos=cos, sin=sin, style=style, rotary=rotary)
        return torch.cat([out.flatten(), pool_k.flatten(), pool_v.flatten()])

    found = best_kernel(ops.tree_attention, context.device, BF16, given=("cos", "sin"))
    expected = outcome(ops.tree_attention, torch.float64)
    return relative_error(outcome(found.target if found else ops.tree_attention, BF16), expected)


def grouped_linear(context: Context, dtype: torch.dtype, inner: int) -> float:
    """Rows [N, K] of eight groups, some of them empty, as a step has them and as a prompt does."""
    random_ = torch.Generator().manual_seed(0)
    groups, outer = 8, context.pick(1536, 24)
    inner = context.pick(inner, inner % 16 + 16)
    weight = torch.randn(groups, outer, inner, generator=random_).to(dtype)
    kernel = best_kernel(ops.grouped_linear, context.device, dtype)
    target = kernel.target if kernel else ops.grouped_linear
    worst = 0.0
    for rows in context.pick((1, 2, 128, 3000), (1, 9)):
        x = torch.randn(rows, inner, generator=random_).to(dtype)
        ends = torch.randint(rows + 1, (groups,), generator=random_).sort()[0]
        ends[1], ends[-1] = ends[0], rows
        found = target(*(t.to(context.device) for t in (x, weight, ends))).cpu()
        error = relative_error(found, ops.grouped_linear(x.double(), weight.double(), ends))
        worst = max(worst, error) if not found.isnan().any() else float("nan")
    return worst


def append(context: Context) -> float:
    """Wrong numbers in the pools after an op that does not rotate; K and V of any strides, every third node padding."""
    kernel = spec(4, 2, 64, value=32)
    inputs = Inputs(kernel, Workload(20, 2, 30), context.device)
    nodes = inputs.q.shape[2]
    k, v = (
        torch.randn(1, nodes, kernel.kv_heads, 2 * dim, device=context.device).to(BF16)[..., ::2].transpose(1, 2)
        for dim in (kernel.key_dim, kernel.value_dim)
    )
    found = best_kernel(ops.tree_attention, context.device, BF16)
    index = inputs.write_index.clone()
    index[::3] = -1
    meta = inputs.positions, index, inputs.node_offsets, inputs.page_table
    meta += inputs.prefix_lens, inputs.tree_lens, inputs.ancestors
    pools, expected = ([p.clone() for p in (inputs.pool_k, inputs.pool_v)] for _ in range(2))
    (found.target if found else ops.tree_attention)(inputs.q, k, v, *pools, *meta, inputs.scale, 0)
    reference.append(k, v, *expected, index)
    return float(sum((a != b).sum() for a, b in zip(pools, expected, strict=True)))


def stochastic_accept(context: Context) -> float:
    """Trees of drawn children, the same uniform numbers on both sides."""
    vocab, wrong = context.pick(32000, 20), 0
    kernel = best_kernel(ops.stochastic_accept, context.device, torch.float64)
    for seed, rule in enumerate(stochastic.RULES * 2):
        random_ = torch.Generator().manual_seed(seed)
        parents = [-1, 0, 0, 1, 1, 2]
        p, q = (torch.rand(6, vocab, generator=random_, dtype=torch.float64).pow(8) for _ in range(2))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        tokens = torch.tensor([0, *(int(torch.multinomial(q[i], 1, generator=random_)) for i in parents[1:])])
        if rule != "multi-step":  # children of one node are different tokens
            tokens[[2, 4]] = (tokens[[1, 3]] + 1) % vocab
        draws = torch.tensor([0, 2, 4, 5, 5, 5, 5]), torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 1, 1, 2])
        uniforms = torch.rand(1, 16, generator=random_, dtype=torch.float64)
        given = (p, q, tokens, torch.tensor(parents), torch.tensor([0, 6]), *draws, uniforms)
        target = kernel.target if kernel else ops.stochastic_accept
        found = target(*(t.to(context.device) for t in given), rule, 3).cpu()
        wrong += int((found != stochastic.reference(*given, rule, 3)).sum())
    return float(wrong)


def commit_path(context: Context) -> float:
    pools = [torch.randn(3, 2, 4, 64, dim, device=context.device, dtype=BF16) for dim in (128, 64)]
    expected = [pool.clone() for pool in pools]
    src, dst = (torch.tensor(x, device=context.device) for x in ([11, 14, 15, 60, 100], [10, 11, 12, 13, 74]))
    commit.reference(expected, src, dst)
    kernel = best_kernel(ops.commit_path, context.device, BF16)
    (kernel.target if kernel else ops.commit_path)(pools, src, dst)
    return float(sum((a != b).sum() for a, b in zip(pools, expected, strict=True)))


def greedy_accept(context: Context) -> float:
    vocab, chance, wrong = context.pick(128256, 50), random.Random(0), 0
    for seed in range(8):
        sizes = [chance.randrange(1, 20) for _ in range(3)]
        offsets = [0, *(sum(sizes[: i + 1]) for i in range(3))]
        parents = [-1 if i == 0 else chance.randrange(i) for size in sizes for i in range(size)]
        logits = torch.randn(sum(sizes), vocab, generator=torch.Generator().manual_seed(seed)).to(BF16)
        tokens = logits.argmax(-1).roll(1)
        for r, size in enumerate(sizes):  # every other child is the token its parent chooses
            for i in range(1, size):
                if i % 2:
                    tokens[offsets[r] + i] = logits[offsets[r] + parents[offsets[r] + i]].argmax()
        given = (logits, tokens, torch.tensor(parents), torch.tensor(offsets))
        kernel = best_kernel(ops.greedy_accept, context.device, BF16)
        target = kernel.target if kernel else ops.greedy_accept
        found = target(*(t.to(context.device) for t in given), 2.0**-7).cpu()
        wrong += int((found != accept.reference(*given, 2.0**-7)).sum())
    return float(wrong)
