"""TreeProgram: a decoder compiled into a token-tree verifier, bound to one module instance."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..capture.alone import alone
from ..capture.call import CallSpec, call_spec, original_module
from ..capture.surroundings import not_traced
from ..converted import Converted
from ..errors import InvalidOption, StaleCache
from ..ir.device import profile
from ..logs import logger
from ..options import Options
from ..tree import Forest, TokenTree
from .arguments import check_cache_sizes, check_call, check_context, check_parts, check_start, check_tokens, new_part
from .batch import Part, rows_of
from .cache import TreeCache
from .compared import Compared
from .executor import Executor, Tally
from .facts import ProgramFacts
from .followed import Followed
from .keys import example_key
from .leading import Leader
from .made import Derive, Made
from .memory import Memory
from .outputs import named, tapped, taps_of
from .prompt import parse_prompt
from .ranks import joined
from .target import as_target

log = logger(__name__)


@not_traced
def tree_program(
    model: nn.Module,
    example: Any = None,
    roles: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> TreeProgram:
    """Compile a decoder into a tree verifier; the same instance and options give the same program.

    `model`: an nn.Module, `torch.compile(module)`, or a module compiled in place. `example` and `roles` say how a
    module with another signature than `model(input_ids)` is called (`call_spec`). Raises `Unsupported` with
    the node, source line and reason when the model cannot be proved to be a causal decoder of a supported kind.
    """
    parsed = Options.parse(options)
    module = original_module(model)
    if not isinstance(module, nn.Module):
        raise InvalidOption(
            name="model", got=type(model).__name__, expected="a torch.nn.Module", fix="Pass the module itself."
        )
    key = (parsed, example_key(example), tuple(sorted((roles or {}).items())))
    with alone():  # two threads that meet here make one program
        programs = _PROGRAMS.setdefault(module, {})
        program = programs.get(key)
        if parsed.ranks > 1:
            joined(parsed.shape)
        if program is None:
            program = programs[key] = TreeProgram(module, call_spec(module, example, roles), parsed)
            return program
    program.check_weights(contents=True)
    return program


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, TreeProgram]] = weakref.WeakKeyDictionary()


class TreeProgram(ProgramFacts):
    """The tree verifier of one module instance. Made by `tree_program`.

    Not thread-safe. Logits have the model's dtype and device and are valid until the next call.
    """

    def __init__(self, model: nn.Module, call: CallSpec, options: Options, converted: Converted | None = None) -> None:
        """`converted`: what the pipeline gave for the model, where somebody watched it."""
        self.options = options
        self._tally = Tally()
        self._followed = Followed(model, call, options, self._tally, converted)
        self._compared = Compared()
        self._memory = Memory.of(model, self.packed_bytes)
        self.leader: Leader | None = None
        """While it is set, other ranks are told of caches and calls, and follow."""

    def executor(self, derive: Derive, options: Options | None = None, tally: Tally | None = None) -> Executor:
        """What runs another graph made of this program's, over the same weights and on the same caches; see `call`.

        It serves until the program is rebuilt. Raises what `derive` raises, `InvalidOption` across ranks.
        """
        self._refuse_other_graphs()
        return self._made.derived(derive, options, tally)

    def variant(
        self, key: Hashable, derive: Derive, options: Options | None = None, tally: Tally | None = None
    ) -> Executor:
        """As `executor`, kept under `key`: made at its first use, and anew after the program was rebuilt.

        Without a `tally` it keeps one of its own, through all of that.
        """
        self._refuse_other_graphs()
        return self._made.variant(key, derive, options, tally)

    def _refuse_other_graphs(self) -> None:
        if self.leader is not None or self.state.stage is not None:
            fix = "Leave out drafts and outputs that read the target's own graph, or the mesh."
            got = "another graph of the target, which the other ranks do not have"
            raise InvalidOption(name="mesh", got=got, expected="the program's own graph alone", fix=fix)

    def new_cache(
        self, max_tokens: int = 4096, slots: int = 1, page_size: int | None = None, pages: int | None = None
    ) -> TreeCache:
        """A tree KV cache with room for `max_tokens` tokens in each slot, uncommitted nodes included.

        With `page_size`, slots take pages of so many tokens as they grow, of `pages` in all (default: enough for every
        slot), and may share them: `cache.adopt`. Raises `OutOfPages` where a call needs more.
        """
        check_cache_sizes(max_tokens, slots, page_size, pages)
        self.check_weights(contents=True)
        self.check()
        return self.unchecked_cache(max_tokens, slots, page_size, pages)

    def unchecked_cache(
        self, max_tokens: int, slots: int, page_size: int | None = None, pages: int | None = None
    ) -> TreeCache:
        """A cache as `new_cache` gives one, without a look at weights, state or the comparison with the model."""
        make = TreeCache if self.leader is None else self.leader.cache
        sizes = (max_tokens, slots, self.device, self._made.commit, page_size, pages)
        cache = make(self.sites, *sizes) if not self.states else TreeCache(self.sites, *sizes, states=self.states)
        self._followed.caches.add(cache)
        return cache

    def check(self) -> None:
        """Compare the program with the model as it will run, once (`program.net`); the first `new_cache` does it too.

        Raises `Unsupported` where they differ.
        """
        model = self._model()
        if model is None or self.options.verify == "off":
            return
        try:
            new = self._compared.own(self, self._executor, model, self._followed.call, found=self.from_cache)
        except Exception as error:
            if not self.from_cache:
                raise
            self._followed.distrust(str(error))
            return self.check()
        if new:
            self._followed.keep()
            self._made.page_out(model)
            self._memory = Memory.of(model, self.packed_bytes)

    def _checked_variant(self, executor: Executor) -> Executor:
        """A graph derived from this program's is compared with the program at its first use; the program's own was."""
        if executor.options.verify != "off":
            self._compared.derived(self, self._executor, executor)
        return executor

    @overload
    def prefill(self, prompt_ids: Any, cache: TreeCache, slot: int = 0) -> Tensor: ...
    @overload
    def prefill(
        self, prompt_ids: Any, cache: TreeCache, slot: int = 0, *, outputs: Sequence[str]
    ) -> dict[str, Tensor]: ...
    def prefill(
        self, prompt_ids: Any, cache: TreeCache, slot: int = 0, *, outputs: Sequence[str] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Commit a prompt; returns the next-token logits [V] after it. Appends if the slot is not empty.

        `prompt_ids`: integers, or a tensor or array of them [S] or [1, S]. Long prompts run in chunks of
        `options.prefill_chunk`; only the last row's logits are computed. Uncommitted nodes of the slot are dropped.
        `outputs` as in `verify`: hidden states are of the whole prompt, [S, D].
        """
        ids, _ = parse_prompt(prompt_ids, several="Prefill each request in its own slot.")
        self._ready(cache, [slot])
        cache._check_slot(slot)
        check_tokens(ids, self.input_vocab)
        check_start([] if cache.length(slot) else ids[:1], self.padding)
        check_context(cache.length(slot) + len(ids), self.max_context, self.limits)
        executor = self._executor if outputs is None else self._checked_variant(self.returning(outputs))
        cache._reserve(slot, len(ids))
        device = profile(self.device)
        chunk = self.options.prefill_chunk or device.prompt_chunk
        pieces: list[Sequence[Tensor]] = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            pages = 0 if device.empty_tables and not cache._lengths[slot] else 1
            cache._reserve(slot, len(piece))
            found = executor.run([Part.prompt(slot, piece, pages)], cache, rows=[len(piece) - 1])
            pieces = [found] if outputs is None else [*pieces, found]
            cache._append(slot, piece)
        logits = pieces[-1][0][0]
        if outputs is None:
            return logits
        hidden = [torch.cat(parts) for parts in list(zip(*pieces, strict=True))[1:]]
        return named(outputs, executor, [logits, *hidden])

    @overload
    def verify(self, tree: TokenTree | Forest, cache: TreeCache) -> Tensor: ...
    @overload
    def verify(self, tree: TokenTree | Forest, cache: TreeCache, outputs: Sequence[str]) -> dict[str, Tensor]: ...
    def verify(
        self, tree: TokenTree | Forest, cache: TreeCache, outputs: Sequence[str] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Next-token logits [N, V] after the path to each node; drops uncommitted nodes first.

        A `TokenTree` continues slot 0, a `Forest` any slots (rows in the forest's order).

        With `outputs`, tensors by these names: "logits", and "hidden:k" [N, D] for the residual stream after k
        attention layers, k = 0 being what the first of them reads. Another graph is compiled at the first use of each
        set of names. Raises `InvalidOption` for other names, `Unsupported` where the model has no such value.
        """
        return self.extend(tree, cache) if outputs is None else self.extend(tree, cache, outputs=outputs)

    @overload
    def extend(self, tree: TokenTree | Forest, cache: TreeCache, start: int | Mapping[int, int] = 0) -> Tensor: ...
    @overload
    def extend(
        self, tree: TokenTree | Forest, cache: TreeCache, start: int | Mapping[int, int] = 0, *, outputs: Sequence[str]
    ) -> dict[str, Tensor]: ...
    def extend(
        self,
        tree: TokenTree | Forest,
        cache: TreeCache,
        start: int | Mapping[int, int] = 0,
        *,
        outputs: Sequence[str] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """As `verify` for nodes >= `start` only; nodes < start are in the cache, uncommitted. [new nodes, V]."""
        if outputs is None:
            return self.call(None, tree, cache, start)[0]
        names = outputs  # asked for once weights were looked at: the program may have been rebuilt
        values = self.call(lambda: self.returning(names), tree, cache, start)
        return named(names, self.returning(names), values)

    def returning(self, outputs: Sequence[str]) -> Executor:
        """What runs a graph with these outputs: the program's own where that has them. Raises as `verify` does."""
        taps = taps_of(outputs, len(self.sites))
        if set(outputs) <= set(self.state.outputs):
            return self._executor
        return self.variant(("tap", taps), lambda state: tapped(state, taps), tally=self._tally)

    def call(
        self,
        executor: Callable[[], Executor] | None,
        tree: TokenTree | Forest,
        cache: TreeCache,
        start: int | Mapping[int, int] = 0,
    ) -> Sequence[Tensor]:
        """`extend` by another graph of this program (see `variant`): its outputs.

        `executor` is asked for after weights were looked at, since other ones may need other graphs. None: its own.
        """
        items: Sequence[tuple[int, TokenTree]] = tree.items if isinstance(tree, Forest) else ((0, tree),)
        made = self._ready(cache, [s for s, _ in items])
        starts = start if isinstance(start, (dict, Mapping)) else dict.fromkeys([s for s, _ in items], start)
        parts = [new_part(cache, slot, each, starts.get(slot, 0)) for slot, each in items]
        check_parts(parts, cache, made.input_vocab, made.max_context, made.limits, made.state.padding)
        chosen = made.executor if executor is None else self._checked_variant(executor())
        outputs = chosen.run(parts, cache)
        for part in parts:
            cache._trees[part.slot] = part.tree
        return outputs

    def mixed(
        self,
        trees: Sequence[tuple[int, TokenTree, int]],
        prompts: Sequence[tuple[int, Sequence[int]]],
        cache: TreeCache,
    ) -> list[Tensor]:
        """One call for trees of some slots, as (slot, tree, start), and pieces of prompts of others, as (slot, tokens).

        Gives logits [new nodes, V] of each tree, as `extend`, then those after each piece [V], which is committed.
        Raises what `extend` and `prefill` raise, before anything is run.
        """
        made = self._ready(cache, [*(slot for slot, _, _ in trees), *(slot for slot, _ in prompts)])
        parts = [replace(new_part(cache, s, t, start), chain=t.is_chain) for s, t, start in trees]
        parts += [Part.prompt(s, ids) for s, ids in prompts]
        check_parts(parts, cache, made.input_vocab, made.max_context, made.limits, made.state.padding)
        sizes, rows = rows_of(parts, len(trees))
        outputs = self._executor.run(parts, cache, rows=rows if prompts else None)[0]
        for part in parts[: len(trees)]:
            cache._trees[part.slot] = part.tree
        for slot, ids in prompts:
            cache._append(slot, ids)
        found = list(outputs.split([*sizes[: len(trees)], *([1] * len(prompts))]))
        return [*found[: len(trees)], *(row[0] for row in found[len(trees) :])]

    def target(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the module is what the program computes: with rounded weights where options round them
        (`weights="int8"`), as it is otherwise. A program that runs within it packs its weights anew.
        """
        model = self._model()
        return as_target(model, self.state) if model is not None else contextlib.nullcontext()

    def refresh(self) -> None:
        """Take the module's present weights, whatever was noticed; rebuild when dtype, device or shape changed."""
        self._followed.renew(narrower=True)

    def check_weights(self, contents: bool = False) -> None:
        """Notice weights that changed: identity, address and version; with `contents`, or after a step of an optimizer,
        a checksum as well; with `contents` the rest of what the model's code reads, too: hooks, attributes, methods,
        adapters. K/V that other weights made raise StaleCache from then on.
        """
        self._followed.look(contents)
        if contents:
            self._made.page_out(self._model())

    def _ready(self, cache: TreeCache, slots: Sequence[int]) -> Made:
        """What to run, of the weights as they are now."""
        followed = self._followed
        followed.look(False)
        made = followed.made
        check_call(cache, made.device)
        cache._check_fresh(slots)
        if cache not in followed.caches:
            raise StaleCache(reason="this program (it belongs to another one)")
        return made
