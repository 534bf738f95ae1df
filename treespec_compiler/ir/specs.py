"""What the passes proved: masks, positions and attention sites as small values.

What runs a program reads the values alone; sympy, in which their predicates are written, comes with the first question
for one.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query sees, as a predicate in positions: `0 <= q - k`, with a window `q - k < window`, and with
    chunks `floor(q / chunk) == floor(k / chunk)`; `pattern` is any further predicate, as text (`predicates.parse`):
    `(k < 4) | (q - k < 8)` shows the first four tokens and the last eight.

    `limit` is the largest context for which the predicate was proved (a mask read from a buffer ends with the buffer).
    """

    window: int = 0
    limit: int | None = None
    chunk: int = 0
    pattern: str = ""

    @property
    def terms(self) -> tuple[Any, ...]:
        """What must hold of Q and K (`ir.predicates`), all of it. Values, texts and the formulas of kernels are derived
        from this."""
        return _terms(self.window, self.chunk, self.pattern)

    @property
    def reach(self) -> int:
        """The largest number in the predicate."""
        return max([self.window, self.chunk, *map(int, re.findall(r"\d+", self.pattern))])

    @property
    def formula(self) -> str:
        from .predicates import text

        return " and ".join(map(text, self.terms))

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The predicate on index tensors; broadcasts."""
        return functools.reduce(operator.and_, (sees(q, k) for sees in _functions(self.terms)))

    def sees(self, q: int, k: int) -> bool:
        """The predicate on two positions."""
        return all(sees(q, k) for sees in _functions(self.terms))

    def _repr_svg_(self) -> str:
        """What a notebook shows: 24 tokens, enough to see a short window."""
        from .drawing import mask_svg

        index = torch.arange(24)
        return mask_svg(self.visible(index[:, None], index[None, :]).tolist(), self.formula)


@functools.cache
def _functions(terms: tuple[Any, ...]) -> tuple[Callable[[Any, Any], Any], ...]:
    from .predicates import K, Q, function

    return tuple(function(term, (Q, K)) for term in terms)


@functools.cache
def _terms(window: int, chunk: int, pattern: str) -> tuple[Any, ...]:
    """A further kind of mask is one more term here."""
    import sympy

    from .predicates import CAUSAL, K, Q, parse

    near = [sympy.Lt(Q - K, window)] if window else []
    together = [sympy.Eq(sympy.floor(Q / chunk), sympy.floor(K / chunk))] if chunk else []
    return (CAUSAL, *near, *together, *([parse(pattern)] if pattern else []))


@dataclass(frozen=True)
class PositionSpec:
    """A value indexed by position: `position + offset`, below `limit` where it reads a table."""

    offset: int
    limit: int | None
    reader: str

    @property
    def formula(self) -> str:
        return f"i + {self.offset}" if self.offset else "i"


@dataclass(frozen=True)
class AttentionSpec:
    """One attention site of the decoder; sites are numbered in graph order and each has its own K/V pool."""

    index: int
    name: str
    layer: str
    source: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    mask: MaskSpec
    dtype: torch.dtype
    softcap: float = 0.0
    bias: str = ""  # "", "slope_h * (k - q)" or "bias_h[q - k]"
    sinks: bool = False
    activation: str = "softmax"
    index_dim: int = 0
    """Of the key by which an indexer scores a token (`ir.chosen_attention`); 0: all keys that the mask shows are seen.
    """
    choice: str = ""
    """Which of them are seen, where an indexer chooses."""

    @property
    def pools(self) -> tuple[tuple[int, int], ...]:
        """(heads, numbers a head) of what is kept of a token: its key, its value, and a key for the indexer."""
        index = ((1, self.index_dim),) if self.index_dim else ()
        return (self.kv_heads, self.key_dim), (self.kv_heads, self.value_dim), *index

    @property
    def formula(self) -> str:
        return f"{self.mask.formula} and {self.choice}" if self.choice else self.mask.formula

    def bytes_per_token(self) -> int:
        return sum(heads * dim for heads, dim in self.pools) * self.dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """One site of the decoder whose past is a state of a fixed size (`ir.states`); numbered in graph order."""

    index: int
    kind: str
    name: str
    layer: str
    source: str
    shape: tuple[int, ...]
    """Of the state of a slot."""
    width: int
    """Numbers that are kept of an uncommitted node."""
    dtype: torch.dtype
    formula: str
    sizes: tuple[int, ...] = ()
    """What else the kind must know of its numbers."""

    def bytes_per_slot(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def bytes_per_node(self) -> int:
        """Of an uncommitted node."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Limit:
    """An upper bound on the context length, and where it comes from."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class LogitsSpec:
    """Where a model called with one text puts its logits: any order of dimensions, one row a token or the last one's.

    `vocabulary` is the dimension of the vocabulary, counted from the end.
    """

    vocabulary: int = -1
    last: bool = False

    @classmethod
    def of(cls, shape: Sequence[Any], length: sympy.Expr) -> LogitsSpec:
        """What a shape in terms of the number of tokens says; sizes of 1 are batches or, without tokens, rows."""
        import sympy

        sizes = [sympy.sympify(s) for s in shape]
        wide = [i for i, s in enumerate(sizes) if s != 1 and s != length]
        last = not any(length in s.free_symbols for s in sizes)
        return cls(wide[0] - len(sizes) if len(wide) == 1 else -1, last)

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, V] of the logits of one text."""
        moved = logits.movedim(self.vocabulary, -1)
        return moved.reshape(-1, moved.shape[-1])


EVERY_ROW = LogitsSpec()
