"""A slow, exact stand-in for `TreeProgram`: every logits row comes from running a function on prefix + path.

It checks the cache contract strictly, so it is the oracle for what the runtime asks of a program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from treespec_compiler.errors import CacheOverflow, ContextOverflow, InvalidPath, TokenOutOfRange
from treespec_compiler.ir.specs import Limit
from treespec_compiler.program.memory import Memory
from treespec_compiler.tree import Forest, TokenTree

Row = Callable[[tuple[int, ...]], Tensor]  # tokens so far -> next-token logits [V]


class FakeCache:
    def __init__(self, max_tokens: int, slots: int) -> None:
        self.max_tokens, self.slots, self.stale = max_tokens, slots, False
        self.prefix: list[list[int]] = [[] for _ in range(slots)]
        self.tree: list[TokenTree | None] = [None] * slots
        self.calls: list[tuple[str, int]] = []

    def length(self, slot: int = 0) -> int:
        return len(self.prefix[slot])

    def commit(self, path: Sequence[int] | Mapping[int, Sequence[int]]) -> None:
        for slot, nodes in path.items() if isinstance(path, Mapping) else [(0, path)]:
            tree = self.tree[slot]
            last = -1
            for node in nodes:
                if tree is None or not 0 <= node < len(tree) or tree.parents[node] != last:
                    raise InvalidPath(got=f"{list(nodes)}", expected="a root path of the tree that was run last")
                self.prefix[slot].append(tree.tokens[node])
                last = node
            self.tree[slot] = None

    def free(self, slot: int) -> None:
        self.prefix[slot], self.tree[slot] = [], None


class FakeProgram:
    """`rows` holds the tokens of every row computed, `calls` the kind and node count of every call."""

    def __init__(self, row: Row, vocab_size: int, max_context: int | None = None) -> None:
        self.row, self.vocab_size, self.input_vocab, self.max_context = row, vocab_size, vocab_size, max_context
        self.limits = [] if max_context is None else [Limit(max_context, "it was told so")]
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.compile_seconds, self.compile_count, self.packed_bytes = 0.0, 0, 0
        self.checks = 0
        self.padding: list[int] = []
        self.calls: list[tuple[str, int]] = []
        self.caches: list[FakeCache] = []

    from_cache = False
    memory = Memory()
    stream_stats = None

    def _model(self) -> None:
        """The module this program was made from: none."""

    def check_weights(self, contents: bool = False) -> None:
        self.checks += contents

    def new_cache(self, max_tokens: int, slots: int = 1) -> FakeCache:
        self.caches.append(FakeCache(max_tokens, slots))
        return self.caches[-1]

    def prefill(self, prompt_ids: Sequence[int], cache: FakeCache, slot: int = 0) -> Tensor:
        tokens = [*prompt_ids]
        assert tokens and all(type(token) is int for token in tokens)
        self.calls.append(("prefill", len(tokens)))
        self._check(tokens, cache.length(slot) + len(tokens) - 1, len(tokens), cache, slot)
        cache.tree[slot] = None
        cache.prefix[slot] += tokens
        return self.row(tuple(cache.prefix[slot]))

    def verify(self, tree: TokenTree | Forest, cache: FakeCache) -> Tensor:
        return self._run("verify", tree, cache, 0)

    def extend(self, tree: TokenTree | Forest, cache: FakeCache, start: int | Mapping[int, int]) -> Tensor:
        return self._run("extend", tree, cache, start)

    def _run(self, kind: str, forest: TokenTree | Forest, cache: FakeCache, starts: int | Mapping[int, int]) -> Tensor:
        items = forest.items if isinstance(forest, Forest) else ((0, forest),)
        rows = []
        for slot, tree in items:
            TokenTree(tree.tokens, tree.parents)  # valid
            old = cache.tree[slot]
            start = starts.get(slot, 0) if isinstance(starts, Mapping) else starts
            if start:
                assert old is not None and len(old) == start < len(tree)
                assert tree.tokens[:start] == old.tokens and tree.parents[:start] == old.parents
            deepest = cache.length(slot) + max(tree.depths)
            self._check(tree.tokens, deepest, len(tree), cache, slot)
            self.calls.append((kind, len(tree) - start))
            cache.calls.append((kind, len(tree) - start))
            for node in range(start, len(tree)):
                rows.append(self.row((*cache.prefix[slot], *tree.path_tokens(node))))
            cache.tree[slot] = tree
        return torch.stack(rows)

    def _check(self, tokens: Sequence[int], deepest: int, count: int, cache: FakeCache, slot: int) -> None:
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise TokenOutOfRange(token=token, index=i, vocab_size=self.vocab_size)
        if self.max_context is not None and deepest >= self.max_context:
            raise ContextOverflow(position=deepest, max_context=self.max_context)
        if cache.length(slot) + count > cache.max_tokens:
            raise CacheOverflow(slot=slot, length=cache.length(slot), new=count, capacity=cache.max_tokens)


def table_row(vocab_size: int, seed: int = 0, *, agree_with: Row | None = None, agreement: float = 0.0) -> Row:
    """Random logits that depend on the last four tokens; with probability `agreement` those of another model instead.

    Where vocabularies differ in size, the other model's logits are cut or padded with low values.
    """

    def row(tokens: tuple[int, ...]) -> Tensor:
        chance = random.Random(f"{seed} {tokens[-4:]}")
        if agree_with is not None and chance.random() < agreement:
            other = agree_with(tokens)[:vocab_size]
            return nn.functional.pad(other, (0, vocab_size - len(other)), value=-9.0)
        return torch.randn(vocab_size, generator=torch.Generator().manual_seed(chance.getrandbits(40)))

    return row


def module_row(model: nn.Module) -> Row:
    """The eager model itself, run on all tokens."""
    seen: dict[tuple[int, ...], Tensor] = {}

    def row(tokens: tuple[int, ...]) -> Tensor:
        if tokens not in seen:
            with torch.no_grad():
                output = model(torch.tensor([tokens]))
            seen[tokens] = getattr(output, "logits", output)[0, -1]
        return seen[tokens]

    return row


def greedy(row: Row, prompt: Sequence[int], count: int) -> list[int]:
    """What greedy decoding of `row` gives: the truth that `generate` is held against."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(row(tuple(tokens)).argmax()))
    return tokens
