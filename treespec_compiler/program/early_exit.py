"""Early exits of a program: its first layers with its head, on its weights, packed weights and caches.

Nothing is held twice: the cut graph reads the target's weight tensors, and runs on the target's own tree cache, where
it writes the first layers' K/V of uncommitted nodes only. The verification that follows writes them again. Committed
tokens need no catching up. Self-speculation by early exit is LayerSkip (arXiv 2404.16710).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidOption, UnreadableModel
from ..options import Lowering, Options
from ..passes.framework.state import GraphState
from ..tree import Forest, TokenTree
from .cache import TreeCache
from .cuda_graphs import GraphStats
from .executor import Executor
from .made import Derive
from .tree_program import TreeProgram


@dataclass(frozen=True, eq=False)
class ExitHead:
    """A trained exit after `layer` layers: the head on projection @ (norm * rmsnorm(h)), instead of the final norm."""

    layer: int
    norm: Tensor
    projection: Tensor
    eps: float

    @classmethod
    def load(cls, weights: Path | str, config: Path | str | None = None) -> ExitHead:
        """From a safetensors file with norm.weight [D] and proj.weight [D, D], and its JSON with `layer` and `eps`.

        Raises UnreadableModel.
        """
        from safetensors.torch import load_file

        try:
            about = json.loads(Path(config or Path(weights).with_suffix(".json")).read_text(encoding="utf-8"))
            tensors = load_file(str(weights))
            head = cls(int(about["layer"]), tensors["norm.weight"], tensors["proj.weight"], float(about["eps"]))
            if head.projection.shape != (head.norm.numel(),) * 2:
                raise ValueError(f"shapes {list(head.norm.shape)} and {list(head.projection.shape)}")
        except Exception as error:  # safetensors has an exception of its own, without a common base
            expected = "norm.weight [D] and proj.weight [D, D] in safetensors, beside it a JSON with layer and eps"
            fix = "Name the safetensors file of a trained exit."
            problem = f"{type(error).__name__}: {error}"
            raise UnreadableModel(name=str(weights), problem=problem, expected=expected, fix=fix) from error
        return head


def exit_graph(layers: int, head: ExitHead | None = None) -> Derive:
    """Makes the graph of the first `layers` attention layers, and the head's tensors; raises `Unsupported`."""

    def derive(state: GraphState) -> tuple[GraphState, Mapping[str, Tensor]]:
        from ..passes.residual.early_exit import HEAD_NORM, HEAD_PROJECTION, early_exit

        state = state.copy()
        if head is None:
            early_exit(state, layers)
            return state, {}
        early_exit(state, layers, {"norm": head.norm, "projection": head.projection, "eps": head.eps})
        own = {HEAD_NORM: head.norm, HEAD_PROJECTION: head.projection}
        like = state.logits.meta["val"]
        return state, {name: x.to(like.device, like.dtype).contiguous() for name, x in own.items()}

    return derive


class EarlyExitProgram:
    """The first `layers` attention layers of a tree program, its final norm and head; runs on the program's caches.

    `lowering`: another one than the program's.
    """

    def __init__(
        self, target: TreeProgram, layers: int, head: ExitHead | None = None, lowering: Lowering | None = None
    ) -> None:
        if head is not None and head.layer != layers:
            expected = f"{head.layer}, the layer the head was trained for"
            raise InvalidOption(name="layers", got=layers, expected=expected)
        self.target, self.layers, self.head = target, layers, head
        self.options: Options = target.options if lowering is None else replace(target.options, lowering=lowering)
        self._key = ("early exit", layers, head, self.options.lowering)
        self._derive = exit_graph(layers, head)
        self._tally = self._executor().tally

    def _executor(self) -> Executor:
        return self.target.variant(self._key, self._derive, self.options)

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def input_vocab(self) -> int:
        return self.target.input_vocab

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def max_context(self) -> int | None:
        return self.target.max_context

    @property
    def compile_seconds(self) -> float:
        """Spent on cutting and compiling this exit so far."""
        return self._tally.seconds

    @property
    def compile_count(self) -> int:
        """How often the exit's graph was compiled."""
        return self._tally.count

    @property
    def graph_digest(self) -> str:
        """See `GraphState.graph_digest`."""
        return self._executor().state.graph_digest

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The cut graph, before lowering."""
        return self._executor().state.gm

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._executor().graph_stats

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads."""
        return self._executor().weight_bytes

    def new_cache(self, max_tokens: int = 4096, slots: int = 1) -> TreeCache:
        """A cache of the target's."""
        return self.target.new_cache(max_tokens, slots)

    def check_weights(self, contents: bool = False) -> None:
        """As the target's."""
        self.target.check_weights(contents)

    def verify(self, tree: TokenTree | Forest, cache: TreeCache) -> Tensor:
        """The exit's logits [N, V] after the path to each node; K/V of its layers only are written."""
        return self.extend(tree, cache)

    def extend(self, tree: TokenTree | Forest, cache: TreeCache, start: int | Mapping[int, int] = 0) -> Tensor:
        """The exit's logits [new nodes, V] after the path to each node >= `start` of an uncommitted tree."""
        return self.target.call(self._executor, tree, cache, start)[0]
