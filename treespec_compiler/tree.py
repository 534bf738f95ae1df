"""Token trees: several continuations of a prefix that share their beginnings, verified by one forward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .errors import InvalidForest, InvalidTree

WORD_BITS = 64
T = TypeVar("T")


class _computed_once(Generic[T]):
    """`functools.cached_property` without its lock: in Python 3.11 it takes longer than what is computed here."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, tree: Any, owner: type) -> T:
        found = tree.__dict__[self._name] = self._compute(tree)
        return found


@dataclass(frozen=True, init=False)
class TokenTree:
    """Immutable tree of tokens; `parents[i] < i`, and -1 continues the committed prefix (several roots are legal)."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __init__(self, tokens: Sequence[int] | Tensor, parents: Sequence[int] | Tensor) -> None:
        token_ids = _ints(tokens, "tokens")
        parent_ids = _ints(parents, "parents")
        _check(token_ids, parent_ids)
        object.__setattr__(self, "tokens", token_ids)
        object.__setattr__(self, "parents", parent_ids)

    @classmethod
    def _trusted(cls, tokens: Iterable[int], parents: Iterable[int]) -> TokenTree:
        """A tree whose maker vouches for it: no checks, which cost more than a small draft's forward pass."""
        tree = cls.__new__(cls)
        object.__setattr__(tree, "tokens", tuple(tokens))
        object.__setattr__(tree, "parents", tuple(parents))
        return tree

    @classmethod
    def chain(cls, tokens: Sequence[int] | Tensor) -> TokenTree:
        """A tree without branches: plain causal decoding of `tokens`."""
        return cls(tokens, range(-1, len(tokens) - 1))

    @classmethod
    def merge(cls, trees: Iterable[TokenTree]) -> TokenTree:
        """One tree with every path of `trees`; equal token paths become one node, in order of first appearance."""
        tokens: list[int] = []
        parents: list[int] = []
        node_of: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
        for tree in trees:
            merged: list[int] = []
            for token, parent in zip(tree.tokens, tree.parents, strict=True):
                key = (-1 if parent < 0 else merged[parent], token)
                if key not in node_of:
                    node_of[key] = len(tokens)
                    tokens.append(token)
                    parents.append(key[0])
                merged.append(node_of[key])
        return cls(tokens, parents)

    def __len__(self) -> int:
        return len(self.tokens)

    @_computed_once
    def depths(self) -> tuple[int, ...]:
        """Edges between each node and its root; a root has depth 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    @_computed_once
    def is_chain(self) -> bool:
        """Whether every node continues the one before it."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    @property
    def roots(self) -> tuple[int, ...]:
        return self.children(-1)

    @_computed_once
    def _children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]  # the last entry: children of -1
        for node, parent in enumerate(self.parents):
            children[parent].append(node)
        return tuple(map(tuple, children))

    def children(self, node: int) -> tuple[int, ...]:
        """Children of `node` in index order; `children(-1)` are the roots."""
        if not -1 <= node < len(self):
            raise IndexError(f"got node {node}, expected -1 (the roots) to {len(self) - 1}")
        return self._children[node]

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        if not 0 <= node < len(self):
            raise IndexError(f"got node {node}, expected 0 to {len(self) - 1}")
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def path_tokens(self, node: int) -> list[int]:
        return [self.tokens[i] for i in self.path(node)]

    @_computed_once
    def _ancestor_rows(self) -> tuple[int, ...]:
        """Row i as one Python integer: bit j set if j is an ancestor of i, or i itself."""
        rows: list[int] = []
        for node, parent in enumerate(self.parents):
            own = 1 << node
            rows.append(rows[parent] | own if parent >= 0 else own)
        return tuple(rows)

    @_computed_once
    def _packed(self) -> dict[int, Tensor]:
        return {}

    def ancestors(self, words: int | None = None) -> Tensor:
        """Packed ancestor rows [N, W] int64: bit (j % 64) of word (j // 64) of row i says that j is above i, or is i.

        The tensor is cached and shared: do not write into it.
        """
        needed = -(-len(self) // WORD_BITS)
        if words is None:
            words = needed
        elif words < needed:
            raise InvalidTree(
                got=f"words={words} for {len(self)} nodes",
                expected=f"at least {needed} words of {WORD_BITS} bits",
                fix="Leave `words` out or give a larger number.",
            )
        packed = self._packed.get(words)
        if packed is None:
            # NOTE: bytes, not a list of ints: a word with bit 63 set does not fit torch.tensor's signed int64.
            rows = b"".join([row.to_bytes(8 * words, "little") for row in self._ancestor_rows])
            packed = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(len(self), words)
            self._packed[words] = packed
        return packed

    def _repr_svg_(self) -> str:
        """What a notebook shows."""
        from .ir.drawing import tree_svg

        return tree_svg(self.tokens, self.parents)

    def draw(self, decode: Callable[[int], str] | None = None, *, accepted: Iterable[int] = ()) -> str:
        """The tree in box-drawing characters, a node a line; `accepted` nodes get a check mark."""
        marked = set(accepted)
        lines: list[str] = []
        # (node, what precedes it on its line, is it its parent's last child); a stack, since chains can be deep
        stack = [(node, "", node == self.roots[-1]) for node in reversed(self.roots)]
        while stack:
            node, indent, last = stack.pop()
            token = self.tokens[node]
            label = str(token) if decode is None else repr(decode(token))
            mark = " ✓" if node in marked else ""
            lines.append(f"{indent}{'└─' if last else '├─'} [{node}] {label}{mark}")
            below = self.children(node)
            indent += "   " if last else "│  "
            stack.extend((child, indent, child == below[-1]) for child in reversed(below))
        return "\n".join(lines)


@dataclass(frozen=True, init=False)
class Forest:
    """Trees of several requests, verified together: `(slot, tree)` pairs, a slot at most once."""

    items: tuple[tuple[int, TokenTree], ...]

    def __init__(self, items: Iterable[tuple[int, TokenTree]]) -> None:
        pairs = tuple(items)
        if not pairs:
            raise InvalidForest(got="no trees", expected="at least one (slot, tree) pair")
        seen: set[int] = set()
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], TokenTree)):
                raise InvalidForest(got=f"the item {pair!r}", expected="a (slot, TokenTree) pair")
            slot = pair[0]
            if not isinstance(slot, int) or isinstance(slot, bool) or slot < 0:
                raise InvalidForest(got=f"slot {slot!r}", expected="an integer of 0 or more")
            if slot in seen:
                raise InvalidForest(got=f"slot {slot} twice", expected="every slot at most once")
            seen.add(slot)
        object.__setattr__(self, "items", pairs)

    @classmethod
    def _trusted(cls, items: Iterable[tuple[int, TokenTree]]) -> Forest:
        """A forest whose maker vouches for it, as `TokenTree._trusted`."""
        forest = cls.__new__(cls)
        object.__setattr__(forest, "items", tuple(items))
        return forest

    def __len__(self) -> int:
        """Nodes of all trees."""
        return sum(len(tree) for _, tree in self.items)

    def __iter__(self) -> Iterator[tuple[int, TokenTree]]:
        return iter(self.items)

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(slot for slot, _ in self.items)


def _ints(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        if values.dtype not in (torch.int64, torch.int32):
            raise InvalidTree(
                got=f"{name} of dtype {values.dtype}", expected="torch.int64", fix=f"Convert: `{name}.to(torch.int64)`."
            )
        if values.dim() != 1:
            raise InvalidTree(
                got=f"{name} of shape {list(values.shape)}",
                expected="one dimension, a value a node",
                fix=f"Flatten: `{name}.flatten()`.",
            )
        return tuple(values.tolist())
    try:
        result = tuple(values)
    except TypeError:
        got = f"{name} of type {type(values).__name__}"
        raise InvalidTree(got=got, expected="a sequence of integers or a 1-D tensor", fix="Pass a list.") from None
    for index, value in enumerate(result):
        if type(value) is not int:
            return tuple(_int(value, f"{name}[{index}]") for index, value in enumerate(result))
    return result


def _int(value: object, where: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # numpy and 0-d tensor integers
        except TypeError:
            pass
    raise InvalidTree(
        got=f"{where} = {value!r} ({type(value).__name__})", expected="integers", fix="Convert the values with `int`."
    )


def _check(tokens: tuple[int, ...], parents: tuple[int, ...]) -> None:
    if len(tokens) != len(parents):
        raise InvalidTree(
            got=f"{len(tokens)} tokens and {len(parents)} parents",
            expected="as many parents as tokens",
            fix="Give every node one token and one parent (-1 for a root).",
        )
    if not tokens:
        raise InvalidTree(
            got="no nodes", expected="at least one", fix="The token sampled last is usually the tree's single root."
        )
    if min(tokens) < 0:
        node = next(i for i, token in enumerate(tokens) if token < 0)
        raise InvalidTree(
            got=f"tokens[{node}] = {tokens[node]}",
            expected="token ids of 0 or more",
            fix="Leave padding out: a tree may have any number of nodes.",
        )
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise _bad_parent(node, parents)


def _bad_parent(node: int, parents: tuple[int, ...]) -> InvalidTree:
    parent, count = parents[node], len(parents)
    got = f"parents[{node}] = {parent}"
    if not -1 <= parent < count:
        return InvalidTree(
            got=f"{got} in a tree of {count} nodes",
            expected=f"-1 or the index of an earlier node (below {node})",
            fix="Use -1 for nodes that continue the committed prefix.",
        )
    trail = [node]
    while 0 <= trail[-1] < count and len(trail) <= count:
        trail.append(parents[trail[-1]])
        if trail[-1] == node:
            return InvalidTree(
                got=f"{got}, a cycle {' -> '.join(map(str, trail))}",
                expected="parents that lead to a root",
                fix="Break the cycle: one of these nodes must be a root (-1) or hang below another node.",
            )
    return InvalidTree(
        got=f"{got}, out of order",
        expected=f"-1 or the index of an earlier node (below {node})",
        fix="List parents before their children.",
    )
