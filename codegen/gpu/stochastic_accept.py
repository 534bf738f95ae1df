"""`treespec_triton::stochastic_accept`: one program a node for what is owed, then one a request for the walk.

A node's weight under the traversal rule comes from its parent: the nodes of each level are a launch of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir import stochastic_accept as definition
from treespec_compiler.ir.library import implement
from treespec_compiler.ir.private_torch import OpOverload

from .launch import Launch
from .sizes import power_of_two

BLOCK = 1024


def walk_block(nodes: int) -> int:
    """Nodes that a walk looks at together: a power of two, and one kernel for all trees of a usual size."""
    return power_of_two(max(nodes, 64))


def stochastic_accept(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    parents: Tensor,
    node_offsets: Tensor,
    draw_offsets: Tensor,
    draw_rows: Tensor,
    draw_q: Tensor,
    uniforms: Tensor,
    rule: str,
    levels: int,
) -> Tensor:
    """As `treespec::stochastic_accept`; float64 throughout, so only the order of sums differs from it."""
    definition.check(p, q, uniforms, draw_rows, rule)
    if any(x.numel() and x.stride(1) != 1 for x in (p, q, uniforms)):
        raise ValueError("got p, q or uniforms with strided rows, expected contiguous ones")
    tokens, parents, node_offsets = (t.contiguous() for t in (tokens, parents, node_offsets))
    draw_offsets, draw_rows, draw_q = (t.contiguous() for t in (draw_offsets, draw_rows, draw_q))
    out = tokens.new_empty(definition.FIELDS * (node_offsets.numel() - 1) + p.shape[0])
    drawn = (draw_offsets, draw_rows, draw_q)
    for launch in chance_launches(p, q, tokens, parents, node_offsets, *drawn, uniforms, out, rule, levels):
        launch.run()
    return out


def chance_launches(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    parents: Tensor,
    node_offsets: Tensor,
    draw_offsets: Tensor,
    draw_rows: Tensor,
    draw_q: Tensor,
    uniforms: Tensor,
    out: Tensor,
    rule: str,
    levels: int,
) -> list[Launch]:
    """What is owed after every node, level by level where the rule has weights, then a walk for each request."""
    from .kernels.stochastic_accept import chance_walk_kernel, residual_kernel, traversal_kernel

    (nodes, vocab_size), requests, draws = p.shape, node_offsets.numel() - 1, draw_rows.numel()
    naive, weighted, replacement = rule == "naive", rule == "traversal", rule not in ("recursive", "traversal")
    if naive:
        draw_offsets = torch.zeros_like(draw_offsets)  # nothing that was drawn has any influence
    block = min(BLOCK, power_of_two(vocab_size))
    blocks = -(-vocab_size // block)
    weights, ratios, totals, lefts = torch.empty(4, max(draws, 1), dtype=torch.float64, device=p.device)
    sums = torch.empty(nodes, blocks, dtype=torch.float64, device=p.device)
    # a request without nodes begins where there may be no node any more
    first, following, last = torch.full((3, nodes + 1 if weighted else 1), -1.0, dtype=torch.float64, device=p.device)
    if weighted:
        first.index_fill_(0, node_offsets[:-1], 1.0)
    sampled = (p, p.stride(0), q, q.stride(0), tokens)
    drawn = (draw_offsets, draw_rows, draw_q)
    found = (weights, ratios, totals, lefts, sums)
    given: tuple[Any, ...]
    launches = []
    for _ in range((levels if weighted else 1) if nodes else 0):
        given = (*sampled, *drawn, first, following, last, *found, vocab_size)
        constants = {"REPLACEMENT": replacement, "WEIGHTED": weighted, "BLOCK": block}
        launches.append(Launch(residual_kernel, (nodes,), given, constants, fusion=False))
        first, following = following, first
    numbers, sizes = (uniforms, uniforms.stride(0)), (out, requests, vocab_size, blocks)
    walk: dict[str, Any] = {"FIELDS": definition.FIELDS, "BLOCK": block, "BLOCKS": power_of_two(blocks)}
    walk["BLOCK_N"] = walk_block(nodes)
    if weighted:
        draw_of = torch.zeros_like(tokens).scatter_(0, draw_rows, torch.arange(draws, device=p.device))
        given = (*sampled, parents, node_offsets, *drawn, draw_of, *numbers, last, *found, *sizes)
        return [*launches, Launch(traversal_kernel, (requests,), given, walk, fusion=False)]
    given = (*sampled, parents, node_offsets, *drawn, *numbers, *found, *sizes)
    walk |= {"NAIVE": naive, "REPLACEMENT": replacement}
    return [*launches, Launch(chance_walk_kernel, (requests,), given, walk, fusion=False)]


STOCHASTIC_ACCEPT: OpOverload = implement(ops.stochastic_accept, "treespec_triton", stochastic_accept)
