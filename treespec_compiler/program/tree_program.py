"""TreeProgram: a decoder compiled into a token-tree verifier, bound to one module instance."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from ..capture.alone import alone
from ..capture.call import CallSpec, call_spec, original_module
from ..capture.fills import as_it_was
from ..capture.state_changes import kept_values
from ..capture.surroundings import not_traced, outside_autocast
from ..errors import ContextOverflow, InvalidOption, InvalidWeight, Refusal, StaleCache, Unsupported
from ..ir import ops
from ..ir.device import profile
from ..ir.registry import best_kernel
from ..ir.specs import AttentionSpec, Limit
from ..logs import logger
from ..options import Options
from ..passes.framework.state import GraphState
from ..pipeline import Converted, convert
from ..tree import Forest, TokenTree
from .arguments import check_tokens, new_part
from .batch import Part
from .cache import TreeCache
from .cuda_graphs import GraphStats
from .executor import Bound, Executor, Tally
from .keys import example_key
from .made import Made
from .net import check_program, check_variant
from .optimizer_steps import steps
from .outputs import tapped, taps_of
from .prompt import parse_prompt
from .semantics import lengths_check, semantic_check
from .weights import Changes, WeightWatch

log = logger(__name__)

# Programs of other states of a model's code, such as its adapters on and off, that are kept without packed weights.
MAX_EARLIER = 3

Derive: TypeAlias = Callable[[GraphState], tuple[GraphState, Mapping[str, Tensor]]]
"""Makes another graph of a program's, which it leaves as it is, and the tensors of inputs that it adds."""


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
        if program is None:
            program = programs[key] = TreeProgram(module, call_spec(module, example, roles), parsed)
            return program
    program.check_weights(contents=True)
    return program


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, TreeProgram]] = weakref.WeakKeyDictionary()


def _named(outputs: Sequence[str], executor: Executor, values: Sequence[Tensor]) -> dict[str, Tensor]:
    found = dict(zip(executor.state.outputs, values, strict=True))
    return {name: found[name] for name in outputs}


class TreeProgram:
    """The tree verifier of one module instance. Made by `tree_program`.

    Not thread-safe. Logits have the model's dtype and device and are valid until the next call.
    """

    def __init__(self, model: nn.Module, call: CallSpec, options: Options) -> None:
        self.options = options
        self._bound = Bound({})
        self._tally = Tally()
        self._tallies: dict[Hashable, Tally] = {}  # of variants, through rebuilds
        self._call = call
        self._earlier: list[Made] = []
        self._checked: weakref.WeakSet[Executor] = weakref.WeakSet()
        self.verify_seconds = 0.0
        """Spent on comparing the program with the model, its lowering included; part of `compile_seconds`."""
        self._model = weakref.ref(model)
        self._caches: weakref.WeakSet[TreeCache] = weakref.WeakSet()
        self._steps = steps()
        self._build(model)

    def _build(self, model: nn.Module) -> None:
        """Convert the model as it is, and leave it so. One that sets what its trace read is converted once it has."""
        with alone(), outside_autocast(), as_it_was(model):
            self._convert(model)
            if self._otherwise(model):
                self._convert(model)
                if reason := self._otherwise(model):
                    raise Unsupported(
                        Refusal.STATE,
                        f"the forward pass changes what it reads, and may be another function each time: {reason}",
                        way_out="move counters and other state of Python out of forward",
                    )

    def _convert(self, model: nn.Module) -> None:
        started = time.perf_counter()
        meaning = [semantic_check(model, self._call)]
        converted: Converted = convert(
            model,
            self._call,
            self.options,
            checks=meaning if self.options.verify_each == "semantic" else (),
            user_checks=meaning if self.options.verify_each == "spec" else (),
        )
        state = converted.state
        watch = WeightWatch(model, converted.sources, converted.proved_from)
        lengths_check(model, self._call, state)
        reads_it = converted.reads is not None and converted.reads.changed(model, self._call) is not None
        if watch.touched() or (converted.kept and reads_it):
            raise kept_values()
        # NOTE nothing is kept before the last refusal: the old program must go on seeing that its model changed.
        self._converted, self._watch = converted, watch
        logits: Any = state.logits.meta["val"]
        self.dtype, self.device, self.vocab_size = logits.dtype, logits.device, int(logits.shape[-1])
        self._bound = Bound({})
        self._bind_weights()
        self._executor = Executor(state, self._bound, self.options, tally=self._tally)
        self._variants: dict[Hashable, Executor] = {}
        kernel = best_kernel(ops.commit_path, self.device, self.dtype) if self.options.kernels == "auto" else None
        self._commit = kernel.target if kernel is not None else ops.commit_path
        self._tally.seconds += time.perf_counter() - started

    def _otherwise(self, model: nn.Module | None) -> str | None:
        """What the trace read and is another now, besides weights."""
        reads = self._converted.reads
        return reads.changed(model, self._call) if model is not None and reads else None

    def _bind_weights(self) -> Changes:
        """The module's present weights, and what is made of those that changed."""
        weights = self._converted.state.weights
        changes = self._watch.renew()
        weights.changed(changes.any)
        self._bound.tensors = dict(weights.tensors)
        self.packed_bytes = weights.own_bytes
        return changes

    def executor(self, derive: Derive, options: Options | None = None, tally: Tally | None = None) -> Executor:
        """What runs another graph made of this program's, over the same weights and on the same caches; see `call`.

        It serves until the program is rebuilt. Raises what `derive` raises.
        """
        began = time.perf_counter()
        tally = tally or Tally()
        state, own = derive(self.state)
        made = Executor(state, self._bound, options or self.options, own, tally)
        tally.seconds += time.perf_counter() - began
        return made

    def variant(
        self, key: Hashable, derive: Derive, options: Options | None = None, tally: Tally | None = None
    ) -> Executor:
        """As `executor`, kept under `key`: made at its first use, and anew after the program was rebuilt.

        Without a `tally` it keeps one of its own, through all of that.
        """
        found = self._variants.get(key)
        if found is None:
            tally = tally or self._tallies.setdefault(key, Tally())
            found = self._variants[key] = self.executor(derive, options, tally)
        return found

    @property
    def compile_seconds(self) -> float:
        """Spent on capture, passes and compilation so far."""
        return self._tally.seconds

    @property
    def compile_count(self) -> int:
        """How often a graph was compiled."""
        return self._tally.count

    @property
    def state(self) -> GraphState:
        """The rewritten graph and what was proved about it; not to be changed."""
        return self._converted.state

    @property
    def input_vocab(self) -> int:
        """Rows of the table that token ids are looked up in."""
        return self._converted.input_vocab or self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, packed ones included, that one pass reads."""
        return self._executor.weight_bytes

    @property
    def sites(self) -> list[AttentionSpec]:
        """Attention sites in graph order."""
        return self._converted.state.sites

    @property
    def max_context(self) -> int | None:
        """Largest number of tokens of one sequence that the program is proved for; None: unlimited."""
        return self._converted.max_context

    @property
    def limits(self) -> list[Limit]:
        """What bounds the context, tightest first."""
        return self._converted.limits

    @property
    def history(self) -> Any:
        """Records of the pipeline's passes."""
        return self._converted.history

    @property
    def notes(self) -> dict[str, Any]:
        """What passes left in `state.notes`."""
        return self._converted.state.notes

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._executor.graph_stats

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph, before lowering."""
        return self._converted.state.gm

    def new_cache(
        self, max_tokens: int = 4096, slots: int = 1, page_size: int | None = None, pages: int | None = None
    ) -> TreeCache:
        """A tree KV cache with room for `max_tokens` tokens in each slot, uncommitted nodes included.

        With `page_size`, slots take pages of so many tokens as they grow, of `pages` in all (default: enough for every
        slot), and may share them: `cache.adopt`. Raises `OutOfPages` where a call needs more.
        """
        wanted = {"max_tokens": max_tokens, "slots": slots}
        wanted |= {} if page_size is None else {"page_size": page_size}
        wanted |= {} if pages is None else {"pages": pages}
        for name, value in wanted.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidOption(name=name, got=value, expected="a positive integer")
        if pages is not None and page_size is None:
            raise InvalidOption(name="pages", got=pages, expected="None, or a page_size beside it")
        self.check_weights(contents=True)
        self.check()
        return self.unchecked_cache(max_tokens, slots, page_size, pages)

    def unchecked_cache(
        self, max_tokens: int, slots: int, page_size: int | None = None, pages: int | None = None
    ) -> TreeCache:
        """A cache as `new_cache` gives one, without a look at weights, state or the comparison with the model."""
        cache = TreeCache(self.sites, max_tokens, slots, self.device, self._commit, page_size, pages)
        self._caches.add(cache)
        return cache

    def check(self) -> None:
        """Compare the program with the model as it will run, once (`program.net`); the first `new_cache` does it too.

        Raises `Unsupported` where they differ.
        """
        model = self._model()
        if model is None or self.options.verify == "off" or self._executor in self._checked:
            return
        with alone(), outside_autocast():
            compiled = self._tally.seconds
            self.verify_seconds += (took := check_program(self, model, self._call))
            self._tally.seconds = max(self._tally.seconds, compiled + took)  # lowering is part of it
        self._checked.add(self._executor)

    def _checked_variant(self, executor: Executor) -> Executor:
        """A graph derived from this program's is compared with the program at its first use; the program's own was."""
        if executor is self._executor or executor in self._checked or executor.options.verify == "off":
            return executor
        with alone(), outside_autocast():
            compiled, tally = executor.tally.seconds, executor.tally
            self.verify_seconds += (took := check_variant(self, self._executor, executor))
            tally.seconds = max(tally.seconds, compiled + took)
        self._checked.add(executor)
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
        check_tokens(ids, self.input_vocab, "the prompt")
        self._check_context(cache.length(slot) + len(ids))
        executor = self._executor if outputs is None else self._checked_variant(self._returning(outputs))
        cache._reserve(slot, len(ids))
        device = profile(self.device)
        chunk = self.options.prefill_chunk or device.prompt_chunk
        pieces: list[Sequence[Tensor]] = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            tree = TokenTree._trusted(piece, range(-1, len(piece) - 1))
            pages = 0 if device.empty_tables and not cache._lengths[slot] else 1
            part = Part(slot, tree, chain=True, pages=pages)
            cache._reserve(slot, len(piece))
            found = executor.run([part], cache, rows=[len(piece) - 1])
            pieces = [found] if outputs is None else [*pieces, found]
            cache._append(slot, piece)
        logits = pieces[-1][0][0]
        if outputs is None:
            return logits
        hidden = [torch.cat(parts) for parts in list(zip(*pieces, strict=True))[1:]]
        return _named(outputs, executor, [logits, *hidden])

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
            return self.call(self._main, tree, cache, start)[0]
        names = outputs  # asked for once weights were looked at: the program may have been rebuilt
        values = self.call(lambda: self._returning(names), tree, cache, start)
        return _named(names, self._returning(names), values)

    def _returning(self, outputs: Sequence[str]) -> Executor:
        """What runs a graph with these outputs: the program's own where that has them."""
        taps = taps_of(outputs, len(self.sites))
        if set(outputs) <= set(self.state.outputs):
            return self._executor
        return self.variant(("tap", taps), lambda state: tapped(state, taps), tally=self._tally)

    def call(
        self,
        executor: Callable[[], Executor],
        tree: TokenTree | Forest,
        cache: TreeCache,
        start: int | Mapping[int, int] = 0,
    ) -> Sequence[Tensor]:
        """`extend` by another graph of this program (see `variant`): its outputs.

        `executor` is asked for after weights were looked at, since other ones may need other graphs.
        """
        items: Sequence[tuple[int, TokenTree]] = tree.items if isinstance(tree, Forest) else ((0, tree),)
        self._ready(cache, [s for s, _ in items])
        parts = [new_part(cache, s, t, start.get(s, 0) if isinstance(start, Mapping) else start) for s, t in items]
        for part in parts:
            self._check_part(part, cache)
        outputs = self._checked_variant(executor()).run(parts, cache)
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
        self._ready(cache, [*(slot for slot, _, _ in trees), *(slot for slot, _ in prompts)])
        parts = [replace(new_part(cache, s, t, start), chain=t.is_chain) for s, t, start in trees]
        parts += [Part(s, TokenTree._trusted(ids, range(-1, len(ids) - 1)), chain=True) for s, ids in prompts]
        for part in parts:
            self._check_part(part, cache)
        sizes = [len(part.tree) - part.start for part in parts]
        ends = [*accumulate(sizes)]
        nodes = ends[len(trees) - 1] if trees else 0
        rows = [*range(nodes), *(end - 1 for end in ends[len(trees) :])]
        outputs = self._executor.run(parts, cache, rows=rows if prompts else None)[0]
        for part in parts[: len(trees)]:
            cache._trees[part.slot] = part.tree
        for slot, ids in prompts:
            cache._append(slot, ids)
        found = list(outputs.split([*sizes[: len(trees)], *([1] * len(prompts))]))
        return [*found[: len(trees)], *(row[0] for row in found[len(trees) :])]

    def _check_part(self, part: Part, cache: TreeCache) -> None:
        """Its tokens are the model's, and there is room for it."""
        check_tokens(part.tree.tokens, self.input_vocab, f"the tree of slot {part.slot}")
        self._check_context(cache.length(part.slot) + max(part.tree.depths) + 1)
        cache._reserve(part.slot, len(part.tree))

    def _main(self) -> Executor:
        return self._executor

    def refresh(self) -> None:
        """Take the module's present weights, whatever was noticed; rebuild when dtype, device or shape changed."""
        self._update()

    def check_weights(self, contents: bool = False) -> None:
        """Notice weights that changed: identity, address and version; with `contents`, or after a step of an optimizer,
        a checksum as well; with `contents` the rest of what the model's code reads, too: hooks, attributes, methods,
        adapters. K/V that other weights made raise StaleCache from then on.
        """
        if contents and (reason := self._otherwise(self._model())):
            self._switch(reason)
        if self._watch.touched() or self._watch.mode_changed():
            self._update()
        elif contents or steps() != self._steps:
            self._steps = steps()
            if self._watch.deep_mode_changed() or self._watch.rearranged() or self._watch.contents_changed():
                self._update()

    def _switch(self, reason: str) -> None:
        """Take the program of the model as it reads now: one made before, if it was so once, or a new one."""
        model = self._model()
        assert model is not None
        log.info("another program: %s", reason)
        self._outdate(f"the model's code or its state changed ({reason})")
        before = Made(**{f.name: getattr(self, f.name) for f in fields(Made)})
        others = [made for made in self._earlier if made is not before]
        found = next((made for made in others if made.suits(model, self._call)), None)
        if found is None:
            self._build(model)
        else:
            for field in fields(Made):
                setattr(self, field.name, getattr(found, field.name))
            self._bind_weights()
        before.rest()
        self._earlier = [before, *(made for made in others if made is not found)][:MAX_EARLIER]

    def _outdate(self, reason: str) -> None:
        for cache in list(self._caches):
            cache.stale = reason
        self._caches.clear()

    def _update(self) -> None:
        model = self._model()
        reason = self._watch.incompatible()
        if model is not None and (reason or self._watch.deep_mode_changed()):
            reason = reason or "the module switched between eval and train mode"
            log.info("rebuilding the tree program: %s", reason)
            self._outdate(reason)
            self._build(model)
            return
        changes = self._bind_weights()
        log.info("bound %d weights anew, %d of them with other values", len(changes.any), len(changes.rewritten))
        if changes.rewritten:
            first, *others = sorted(changes.rewritten)
            reason = f"{first} got other values" if not others else f"{first} and {len(others)} more got other values"
            for cache in self._caches:
                cache._outdate(reason)

    def _ready(self, cache: TreeCache, slots: Sequence[int]) -> None:
        if not isinstance(cache, TreeCache):
            raise InvalidOption(
                name="cache", got=type(cache).__name__, expected="a TreeCache", fix="Use program.new_cache()."
            )
        if self.device.type == "meta":
            got, fix = "weights on the meta device", "Load the model's weights; without them it can only be converted."
            raise InvalidWeight(got=got, expected="numbers to compute with", fix=fix)
        self.check_weights()
        cache._check_fresh(slots)
        if cache not in self._caches:
            raise StaleCache(reason="this program (it belongs to another one)")

    def _check_context(self, length: int) -> None:
        limit = self.max_context
        if limit is not None and length > limit:
            raise ContextOverflow(position=length - 1, max_context=limit, why=self.limits[0].reason)

    def __repr__(self) -> str:
        model = self._model()
        name = type(model).__name__ if model is not None else "a deleted module"
        masks = ", ".join(sorted({s.mask.formula for s in self.sites}))
        context = self.max_context or "unlimited"
        stats = self.graph_stats
        graphs = "" if stats.off else f", {stats}"
        return f"TreeProgram({name}: {len(self.sites)} attention sites, mask {masks}, context {context}{graphs})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the sites as a table."""
        from html import escape

        rows = "".join(
            f"<tr><td>{s.index}</td><td>{escape(s.layer or s.name)}</td><td>{s.heads}/{s.kv_heads}</td>"
            f"<td>{s.key_dim}/{s.value_dim}</td><td><code>{escape(s.mask.formula)}</code></td></tr>"
            for s in self.sites
        )
        head = "<tr><th>#</th><th>module</th><th>heads/KV</th><th>dims</th><th>mask</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>"
