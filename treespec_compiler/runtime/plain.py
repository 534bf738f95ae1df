"""The plain loop: what `on_unsupported="fallback"` runs. To a request the original module is one more program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call import logits_of
from ..errors import ModelFailed
from ..options import Options
from ..program.memory import Memory
from ..tree import Forest, TokenTree


class PlainCache:
    """The tokens themselves: nothing that was computed is kept."""

    def __init__(self, max_tokens: int, slots: int) -> None:
        self.max_tokens, self.slots = max_tokens, slots
        self.stale: str | None = None
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._trees: list[TokenTree | None] = [None] * slots

    def length(self, slot: int = 0) -> int:
        return len(self.tokens[slot])

    def commit(self, path: Mapping[int, Sequence[int]]) -> None:
        for slot, nodes in path.items():
            tree = self._trees[slot]
            self.tokens[slot] += [tree.tokens[node] for node in nodes] if tree is not None else []
            self._trees[slot] = None

    def free(self, slot: int = 0) -> None:
        self.tokens[slot], self._trees[slot] = [], None


class PlainProgram:
    """Runs the whole sequence again for every row, which is right for every causal model.

    Raises `ModelFailed` where the module raises an error.
    """

    compile_seconds = 0.0
    from_cache = False
    memory = Memory()
    stream_stats = None
    max_context: int | None = None

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        parameter = next(module.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        scripted = isinstance(module, torch.jit.ScriptModule)  # it has no signature
        cached = not scripted and "use_cache" in inspect.signature(module.forward).parameters
        self._arguments: dict[str, Any] = {"use_cache": False} if cached else {}

    def new_cache(self, max_tokens: int = 4096, slots: int = 1) -> PlainCache:
        return PlainCache(max_tokens, slots)

    def prefill(self, prompt_ids: Sequence[int], cache: PlainCache, slot: int = 0) -> Tensor:
        """Next-token logits [V] after the prompt."""
        cache.tokens[slot] += prompt_ids
        return self._row(cache.tokens[slot])

    def verify(self, tree: TokenTree | Forest, cache: PlainCache) -> Tensor:
        """Next-token logits [N, V] after the path to each node."""
        rows = []
        for slot, each in tree.items if isinstance(tree, Forest) else ((0, tree),):
            rows += [self._row([*cache.tokens[slot], *each.path_tokens(node)]) for node in range(len(each))]
            cache._trees[slot] = each
        return torch.stack(rows)

    def _row(self, tokens: list[int]) -> Tensor:
        try:
            # NOTE: no inference mode: what a foreign module keeps from a call must stay usable outside. And `forward`,
            # so that a module compiled in place does not go through Dynamo for every length.
            with torch.inference_mode(False), torch.no_grad():
                ids = torch.tensor([tokens], dtype=torch.int64, device=self.device)
                logits = logits_of(self.module.forward(ids, **self._arguments))
        except Exception as error:
            raise ModelFailed(tokens=len(tokens), problem=f"{type(error).__name__}: {error}") from error
        if not isinstance(logits, Tensor) or not 1 <= logits.dim() <= 3:
            raise ModelFailed(tokens=len(tokens), problem=f"{_what(logits)} as logits")
        return logits.reshape(-1, logits.shape[-1])[-1]


def _what(logits: object) -> str:
    return f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
