"""The model's own answer where an indexer's scores tie: that of its decoding.

Which of equal scores torch.topk takes depends on how many stand behind them. So a model with an indexer that is run on
a whole text may choose, for a token in its middle, otherwise than it did when that token was the last one. A program
chooses as decoding does (`ir.chosen_attention`). In `own_choices`, a run of the model on a whole text does so as well:
torch.topk, asked for the largest of each row of a square that hides what lies behind its diagonal, answers each row
from what stands before it, and so for a square whose columns are blocks of tokens. Every answer is one that torch.topk
may give for the whole row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..ir import ops
from ..ir.library import arguments, definition
from ..passes.framework.state import GraphState

_TOPK = (torch.topk, torch.Tensor.topk)


def own_choices(state: GraphState) -> contextlib.AbstractContextManager[Any]:
    """For runs of the model that this is the graph of; without an indexer in it, nothing is changed."""
    blocks = {arguments(node)["block"] for node in state.graph.nodes if _chooses(node)}
    return _OwnChoices(sorted(blocks)) if blocks else contextlib.nullcontext()


def _chooses(node: fx.Node) -> bool:
    """Whether attention behind an indexer, at any level."""
    if definition(node.target) is ops.tree_chosen_attention:
        return True
    return node.target in (ops.attention, ops.causal_attention) and bool(arguments(node)["chosen"])


class _OwnChoices(TorchFunctionMode):
    """`blocks`: of how many tokens a column may be."""

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        self.blocks = blocks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _largest(*args, **kwargs) if func in _TOPK else None
        block = None if found is None else next((b for b in self.blocks if _causal(found[0], b)), None)
        return func(*args, **kwargs) if found is None or block is None else _by_row(*found, block)


def _largest(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, out: Any = None
) -> tuple[Tensor, int] | None:
    """What torch.topk is asked; None: not for the largest of rows."""
    return (input, k) if largest and out is None and input.dim() > 1 and dim in (-1, input.dim() - 1) else None


def _causal(scores: Tensor, block: int) -> bool:
    """Whether [.., T, blocks], with minus infinity behind each token's own block and not for that one."""
    rows, columns = scores.shape[-2:]
    if columns != -(-rows // block) or not scores.is_floating_point():
        return False
    own = torch.arange(rows, device=scores.device) // block
    behind = torch.arange(columns, device=scores.device) > own[:, None]
    on = scores.gather(-1, own[:, None].expand(*scores.shape[:-1], 1))
    return bool((scores[..., behind] == -torch.inf).all()) and not bool((on == -torch.inf).any())


def _by_row(scores: Tensor, k: int, block: int) -> Any:
    """As torch.topk, row i from the blocks of its first i + 1 tokens; hidden ones follow in their order."""
    values = scores.new_full((*scores.shape[:-1], k), -torch.inf)
    indices = torch.arange(k, device=scores.device).expand(values.shape).clone()
    for i in range(scores.shape[-2]):
        there = i // block + 1
        own = min(k, there)
        best = scores[..., i, :there].topk(own, -1)
        values[..., i, :own], indices[..., i, :own] = best.values, best.indices
    return torch.return_types.topk((values, indices))
