"""Calls of ops that keep a state beside K/V: what a cache gives them for requests with trees, as `pack` does."""

from __future__ import annotations

from typing import Any

import torch
from oracles import random_tree
from torch import Tensor

from treespec_compiler.ir import ops
from treespec_compiler.ir.exponential_recurrence import state_size
from treespec_compiler.ir.specs import StateSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache

CPU = torch.device("cpu")
CHANNELS, LAG = 6, 3
KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 3, 5


def _metadata(spec: StateSpec, sizes: list[int]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(stash, state, the rest), where each slot has a state of its own."""
    cache = TreeCache([], 256, len(sizes), CPU, ops.commit_path, states=[spec])
    parts = [Part(slot, random_tree(size, 50, slot + 1)) for slot, size in enumerate(sizes)]
    batch = pack(parts, cache, CPU).meta
    assert cache.states is not None
    stash, state = cache.states.tensors
    state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(5)))
    rest = (batch.node_offsets, batch.prefix_lens, batch.tree_lens, batch.ancestors)
    return stash, state, (*rest, batch.state_slots, batch.state_rows)


def convolution(dtype: torch.dtype, sizes: list[int], groups: int = CHANNELS, spoilt: bool = False) -> dict[str, Any]:
    """Arguments of `tree_convolution`, and which of them it writes."""
    torch.manual_seed(0)
    spec = StateSpec(0, "convolution", "c", "", "", (LAG, CHANNELS), CHANNELS, dtype, "")
    stash, state, rest = _metadata(spec, sizes)
    x = torch.randn(1, CHANNELS, sum(sizes)).to(dtype)
    if spoilt:
        x[..., -1] = torch.nan
    weight, bias = torch.randn(CHANNELS, CHANNELS // groups, LAG + 1).to(dtype), torch.randn(CHANNELS).to(dtype)
    return {"arguments": (x, weight, bias, stash, state, *rest, LAG, 1, groups), "written": (3,)}


def exponential(
    dtype: torch.dtype, sizes: list[int], bonus: bool, from_zero: bool, spread: float = 3.0
) -> dict[str, Any]:
    """Arguments of `tree_exponential_recurrence`, and which of them it writes; gates up to a few times `spread`."""
    torch.manual_seed(0)
    width, shape = KEY_HEADS * KEY + HEADS * (VALUE + 2), (HEADS, state_size(KEY, VALUE))
    spec = StateSpec(0, "exponential recurrence", "r", "", "", shape, width, dtype, "", (KEY_HEADS, KEY, from_zero))
    stash, state, rest = _metadata(spec, sizes)
    count = sum(sizes)
    q, k = (torch.randn(1, count, KEY_HEADS, KEY).to(dtype) for _ in "qk")
    v = torch.randn(1, count, HEADS, VALUE).to(dtype)
    decay, gate, extra = (
        x.to(dtype) for x in (-torch.rand(1, count, HEADS), *spread * torch.randn(2, 1, count, HEADS))
    )
    return {
        "arguments": (q, k, v, decay, gate, extra if bonus else None, stash, state, *rest, from_zero),
        "written": (6,),
    }


def recurrence(
    dtype: torch.dtype,
    sizes: list[int],
    delta: bool,
    rows: int = 1,
    shape: tuple[int, int, int] = (HEADS, KEY, VALUE),
) -> dict[str, Any]:
    """Arguments of `tree_recurrence`, and which of them it writes; `rows`: of a state that decay apart."""
    torch.manual_seed(0)
    heads, key, value = shape
    width = KEY_HEADS * key + heads * value + heads * rows
    spec = StateSpec(0, "recurrence", "r", "", "", shape, width, dtype, "", (KEY_HEADS,))
    stash, state, rest = _metadata(spec, sizes)
    count = sum(sizes)
    q, k = (torch.nn.functional.normalize(torch.randn(1, count, KEY_HEADS, key), dim=-1).to(dtype) for _ in "qk")
    v = torch.randn(1, count, heads, value).to(dtype)
    decay = -torch.rand(1, count, heads, *([rows] if rows > 1 else [])).to(dtype)
    beta = torch.rand(1, count, heads).to(dtype) if delta else None
    return {"arguments": (q, k, v, decay, beta, stash, state, *rest), "written": (5,)}
